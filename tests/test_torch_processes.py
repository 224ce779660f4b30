"""PyTorch in several gloo processes: the same updates as one process and as MXNet with two contexts, clean ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_devices import first_state, make_batches, network
from test_launch import END_SECONDS, SLOW, assert_same_files, is_running, updates

from conftest import ROOT, read_lines, start_training, without_times
from engines.base import Batch
from engines.torch_engine import TorchEngine
from graph.params_file import read_arrays
from training.checkpoint import find_latest

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LR = 0.02


def losses(log_dir: Path) -> list[float]:
    return [line["loss"] for line in read_lines(log_dir) if line["type"] == "train"]


@pytest.fixture
def torch_flags(train_flags):
    def build(name="run", **changes):
        flags = {"engine": "torch", "cpus": 2, "frequent": 1, "lr_steps": "", "drop_out": 0.2, **changes}
        return train_flags(name, **flags)

    return build


def wait_for_update(process: subprocess.Popen, log_dir: Path, update: int) -> None:
    deadline = time.monotonic() + 60
    while updates(log_dir) < update:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_losses_are_those_of_mxnet_with_two_contexts(train, train_flags, torch_flags, tmp_path):
    # Slow learning keeps rounding from being amplified; see test_torch_engine.
    flags = {"epochs": 4, "lr": 0.0005, "drop_out": 0, "cpus": 2}
    assert train(train_flags("mxnet", **flags, engine="symbol", frequent=1, lr_steps="")) == 0
    assert train(torch_flags("torch", **flags)) == 0
    found, expected = (losses(tmp_path / "log" / name) for name in ("torch", "mxnet"))
    assert len(expected) > 20
    np.testing.assert_allclose(found, expected, atol=1e-4)
    one, other = (read_arrays(tmp_path / "model" / f"{name}-0004.params") for name in ("mxnet", "torch"))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def test_with_shared_statistics_two_processes_are_one(train, torch_flags, tmp_path):
    flags = {"epochs": 3, "lr": 0.002, "drop_out": 0}
    assert train(torch_flags("one", **{**flags, "cpus": 1})) == 0
    assert train(torch_flags("two", **flags, sync_bn=True)) == 0
    one, two = (losses(tmp_path / "log" / name) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    validation = [read_lines(tmp_path / "log" / name)[-1]["validation"]["loss"] for name in ("one", "two")]
    assert validation[1] == pytest.approx(validation[0], rel=1e-3)


def test_killed_rank_is_named_and_the_job_resumes_exactly(torch_flags, tmp_path):
    flags = {"epochs": 3, "save_every": 4, "lr": 0.01}
    # Plain torchrun, and the engine left to the project.
    straight = subprocess.Popen(
        [*TORCHRUN, "train_se_resnext.py", *torch_flags("straight", **{**flags, "cpus": None, "engine": None})],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    killed = start_training(torch_flags("killed", **flags, max_restarts=1), stderr=subprocess.PIPE, text=True)
    wait_for_update(killed, tmp_path / "log" / "killed", 8)
    ranks = ranks_of(killed)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    for process in (killed, straight):
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
        if process is killed:
            assert re.search(rf"rank \d \(process {ranks[1]}\) was killed by SIGKILL; restart 1 of 1", error), error
    assert_same_files(tmp_path / "model", "straight", "killed", 3)
    logs = [without_times(read_lines(tmp_path / "log" / name)) for name in ("straight", "killed")]
    assert logs[0] == logs[1]


def test_a_dead_rank_ends_the_job(torch_flags, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start_training(torch_flags(epochs=SLOW), stderr=subprocess.PIPE, text=True)
    wait_for_update(process, tmp_path / "log" / "run", 7)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    begin = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert time.monotonic() - begin < END_SECONDS
    assert process.returncode == 1
    assert re.search(rf"^error: rank \d \(process {ranks[1]}\) was killed by SIGKILL", error, re.MULTILINE), error
    assert "Traceback" not in error
    assert not any(is_running(pid) for pid in ranks)
    assert not list(temporary.iterdir())
    checkpoint, passed_over = find_latest(tmp_path / "model" / "run")
    assert checkpoint.epoch >= 1
    assert not passed_over


def test_a_rank_that_stands_still_is_ended_and_the_job_goes_on(torch_flags, tmp_path):
    flags = {"epochs": 3, "save_every": 2, "stall_timeout": 3, "max_restarts": 1}
    process = start_training(torch_flags(**flags), stderr=subprocess.PIPE, text=True)
    wait_for_update(process, tmp_path / "log" / "run", 4)
    rank = ranks_of(process)[1]
    os.kill(rank, signal.SIGSTOP)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert re.search(rf"rank \d \(process {rank}\) stands still \(SIGSTOP\); restart 1 of 1", error), error
    assert re.search(r"continuing from run-000\db000000\d", error), error
    assert not is_running(rank)


def test_a_rank_that_cannot_stop_is_named(torch_flags, tmp_path):
    flags = {"epochs": SLOW, "stall_timeout": 2, "max_restarts": 1}
    process = start_training(torch_flags(**flags), stderr=subprocess.PIPE, text=True)
    wait_for_update(process, tmp_path / "log" / "run", 3)
    rank = ranks_of(process)[1]
    os.kill(rank, signal.SIGSTOP)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert re.search(rf"^error: rank \d \(process {rank}\) stands still", error, re.MULTILINE), error


@pytest.mark.parametrize("to", ["the launcher", "a rank", "all, twice"])
def test_sigterm_stops_all_ranks_with_one_checkpoint(torch_flags, tmp_path, to):
    process = start_training(torch_flags(epochs=SLOW, max_restarts=1), stderr=subprocess.PIPE, text=True)
    wait_for_update(process, tmp_path / "log" / "run", 3)
    ranks = ranks_of(process)
    signalled = {"the launcher": [process.pid], "a rank": ranks[1:], "all, twice": [process.pid, *ranks] * 2}[to]
    for pid in signalled:
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error.count("--resume goes on") == 1
    assert "Traceback" not in error
    assert find_latest(tmp_path / "model" / "run")[0].state.updates == updates(tmp_path / "log" / "run")


def test_ranks_go_on_from_where_the_first_one_is(train, torch_flags, tmp_path):
    """Every process in a folder of its own, as on machines without a common file system."""
    flags = {"model_prefix": "model/run", "log_dir": "log", "cpus": None}
    script = f'cd "{tmp_path}/rank$RANK" && exec "{sys.executable}" "{ROOT / "train_se_resnext.py"}" "$@"'
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()

    def run(*more: str, **changes) -> str:
        command = [*TORCHRUN, "--no-python", "sh", "-c", script, "sh", *torch_flags(**flags, **changes), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done.stderr

    run(epochs=1)
    assert "continuing from run-0001" in run("--resume", epochs=2)
    assert not list((tmp_path / "rank1").iterdir())
    assert train(torch_flags("straight", epochs=2)) == 0
    for extension in ("params", "states"):
        found = tmp_path / "rank0" / "model" / f"run-0002.{extension}"
        assert found.read_bytes() == (tmp_path / "model" / f"straight-0002.{extension}").read_bytes()
    # Flags that differ would leave the processes waiting for each other.
    script = script.replace('"$@"', '"$@" --frequent $((RANK + 1))')
    error = run("--resume", epochs=3)
    assert "error: --frequent: 2 in rank 1, 1 in rank 0" in error
    assert error.count("error: --") == 1


def trained_alone(symbol, batches: list[Batch], **options) -> dict[str, np.ndarray]:
    engine = TorchEngine(symbol.tojson(), image_shape=(3, 12, 12), batch_size=len(batches[0].labels), **options)
    engine.set_state(first_state(symbol))
    for batch in batches:
        engine.train_batch(batch, LR)
    state = engine.get_state()
    return {**state.params, **state.optimizer}


@pytest.mark.parametrize(
    ("processes", "options"),
    [(2, {"accumulate": 2}), (4, {}), (2, {"compile": True}), (2, {"memonger": True})],
    ids=str,
)
def test_without_batchnorm_processes_are_one(tmp_path, processes, options):
    symbol, batches = network(batch_norm=False), make_batches()
    (tmp_path / "net.json").write_text(symbol.tojson())
    (tmp_path / "options.json").write_text(json.dumps({"lr": LR, **options}))
    np.savez(tmp_path / "first.npz", **first_state(symbol).params)
    np.savez(
        tmp_path / "batches.npz",
        images=np.stack([batch.images for batch in batches]), labels=np.stack([batch.labels for batch in batches]),
        pads=[batch.pad for batch in batches],
    )  # fmt: skip
    command = [*TORCHRUN[:-1], str(processes), ROOT / "tests" / "torch_worker.py", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found, expected = np.load(tmp_path / "last.npz"), trained_alone(symbol, batches)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_accumulating_is_the_large_batch(micro_batches):
    symbol = network(batch_norm=False)
    found = trained_alone(symbol, make_batches(), accumulate=micro_batches)
    for name, array in trained_alone(symbol, make_batches()).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 15, "cpus": 2}, "--batch-size 15 cannot be shared by 2 processes"),
        ({"batch_size": 6, "accumulate": 4, "cpus": 2}, "lower --accumulate"),
        ({"engine": "symbol", "accumulate": 2}, "--accumulate needs PyTorch"),
        ({"engine": "gluon", "sync_bn": True}, "--sync-bn needs PyTorch"),
        ({"kv_store": "dist_sync"}, "--kv-store dist_sync is MXNet's"),
        ({"cpus": None, "gpus": "0,9"}, "PyTorch sees no GPU"),
    ],
)
def test_mistakes_are_refused_in_one_line(train, torch_flags, capfd, flags, message):
    assert train(torch_flags(**flags)) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_torchrun_and_the_flags_must_agree(train, torch_flags, capfd, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert train(torch_flags(cpus=2)) == 2
    assert "--nproc-per-node 2" in capfd.readouterr().err
    assert train(torch_flags(engine="symbol", cpus=None)) == 2
    assert "torchrun" in capfd.readouterr().err
