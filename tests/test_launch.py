"""Distributed MXNet training on loopback, with real processes: the same numbers, and a clean end whatever dies.

A job starts four processes that import MXNet, so every test here asks as much of its job as it can.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, read_lines, without_times
from engines.kv_server import GRACE_SECONDS
from errors import UsageError
from graph.params_file import read_arrays
from training.checkpoint import find_latest
from training.launch import build_parser, free_port, read_hosts
from training.launch_processes import remote_command

END_SECONDS = 10  # within which a death ends everything
SLOW = 500  # epochs of a job that ends only when something ends it


class Job:
    """The launcher as a process of its own, with what it says."""

    def __init__(self, argv, *, launcher=(), workers=2, environment=None):
        command = [sys.executable, "-m", "training.launch", "-n", str(workers), *map(str, launcher), "--"]
        self.process = subprocess.Popen(
            [*command, sys.executable, "train_se_resnext.py", *argv],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip
        self.text = ""

    def pids(self) -> dict[str, int]:
        """`worker 1` -> process id, as the launcher announced them."""
        while "started" not in self.text:
            self.text += self.process.stderr.readline()
        return {
            name: int(pid) for name, pid in re.findall(r"(\w+(?: \d+)?) \((?:rank \d+, )?process (\d+)\)", self.text)
        }

    def wait(self, timeout=120) -> int:
        self.text += self.process.communicate(timeout=timeout)[1]
        return self.process.returncode

    def wait_for_update(self, log_dir: Path, update: int) -> None:
        deadline = time.monotonic() + 60
        while updates(log_dir) < update:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def updates(log_dir: Path) -> int:
    try:
        return max((line.get("update", 0) for line in read_lines(log_dir)), default=0)
    except (FileNotFoundError, ValueError):
        return 0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def dist_flags(train_flags):
    def build(name="run", **changes):
        # Every train line is an update of its own; dropout shows whether a resumed run draws the same masks.
        return train_flags(name, **{"kv_store": "dist_sync", "frequent": 1, "drop_out": 0.2, "epochs": 2, **changes})

    return build


def assert_same_files(model: Path, left: str, right: str, epoch: int) -> None:
    for extension in ("params", "states"):
        one, other = (model / f"{name}-{epoch:04d}.{extension}" for name in (left, right))
        assert one.read_bytes() == other.read_bytes(), extension


def test_two_workers_train_as_two_contexts_and_resume_exactly_after_a_kill(train, train_flags, dist_flags, tmp_path):
    flags = {"lr_steps": "", "lr": 0.01, "drop_out": 0.0, "epochs": 3, "save_every": 4}
    assert train(train_flags("contexts", **flags, cpus=2, frequent=1, engine="symbol")) == 0
    assert (straight := Job(dist_flags("straight", **flags))).wait() == 0, straight.text
    job = Job(dist_flags("killed", **flags), launcher=["--max-restarts", 1])
    pids = job.pids()
    job.wait_for_update(tmp_path / "log" / "killed", 8)
    os.kill(pids["worker 1"], signal.SIGKILL)
    assert job.wait() == 0, job.text
    assert f"process {pids['worker 1']}) was killed by SIGKILL" in job.text
    assert "continuing from killed-" in job.text
    assert not any(is_running(pid) for pid in pids.values())
    assert_same_files(tmp_path / "model", "straight", "killed", 3)
    logs = [without_times(read_lines(tmp_path / "log" / name)) for name in ("contexts", "straight", "killed")]
    assert logs[1] == logs[2]
    contexts, workers = ([line["loss"] for line in log if line["type"] == "train"] for log in logs[:2])
    np.testing.assert_allclose(workers, contexts, rtol=1e-5)
    validation = [log[-1]["validation"] for log in logs[:2]]
    assert validation[1] == pytest.approx(validation[0], rel=1e-4)
    one, other = (read_arrays(tmp_path / "model" / f"{name}-0003.params") for name in ("contexts", "straight"))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_gluon_trains_on_two_workers(train, train_flags, dist_flags, tmp_path):
    flags = {"lr_steps": "", "lr": 0.01, "drop_out": 0.0, "epochs": 1, "engine": "gluon"}
    assert train(train_flags("contexts", **flags, cpus=2)) == 0
    assert (job := Job(dist_flags("workers", **flags))).wait() == 0, job.text
    one, other = (read_arrays(tmp_path / "model" / f"{name}-0001.params") for name in ("contexts", "workers"))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.fixture
def another_launcher():
    """Starts a job as SLURM or Kubernetes do: nobody but the environment says who is who. Here with two servers."""
    processes: list[subprocess.Popen] = []

    def start(argv: list[str]) -> list[subprocess.Popen]:
        shared = {
            "DMLC_PS_ROOT_URI": "127.0.0.1", "DMLC_PS_ROOT_PORT": str(free_port()), "DMLC_NUM_SERVER": "2",
            "DMLC_NUM_WORKER": "2", "DMLC_NODE_HOST": "127.0.0.1", "OMP_NUM_THREADS": "1",
            # Arrays above the bound are shared by the servers.
            "MXNET_KVSTORE_BIGARRAY_BOUND": "1000",
        }  # fmt: skip
        for role in ("scheduler", "server", "server", "worker", "worker"):
            command = ["train_se_resnext.py", *argv] if role == "worker" else ["-m", "engines.kv_server"]
            environment = {**os.environ, **shared, "DMLC_ROLE": role}
            processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment))
        return processes

    yield start
    for process in processes:
        process.kill()


def test_variables_of_another_launcher_are_taken_as_they_are(
    train, train_flags, dist_flags, tmp_path, another_launcher
):
    flags = {"lr_steps": "", "lr": 0.01, "drop_out": 0.0, "epochs": 1, "engine": "symbol"}
    assert train(train_flags("contexts", **flags, cpus=4)) == 0
    processes = another_launcher(dist_flags("workers", **{**flags, "kv_store": "dist_device_sync"}, cpus=2))
    assert [process.wait(timeout=60) for process in processes] == [0] * len(processes)
    one, other = (read_arrays(tmp_path / "model" / f"{name}-0001.params") for name in ("contexts", "workers"))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_signal_to_all_processes_lets_the_workers_save(dist_flags, tmp_path, another_launcher):
    processes = another_launcher(dist_flags(epochs=SLOW, lr_steps=""))
    deadline = time.monotonic() + 60
    while updates(tmp_path / "log" / "run") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    stopped = 128 + signal.SIGTERM
    assert [process.wait(timeout=GRACE_SECONDS - 5) for process in processes] == [0, 0, 0, stopped, stopped]
    assert find_latest(tmp_path / "model" / "run")[0].state.updates == updates(tmp_path / "log" / "run")


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = {
            "DMLC_ROLE": "scheduler", "DMLC_PS_ROOT_URI": "127.0.0.1", "DMLC_NUM_SERVER": "1", "DMLC_NUM_WORKER": "1",
            "DMLC_PS_ROOT_PORT": str(taken.getsockname()[1]),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "engines.kv_server"],
            cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"127.0.0.1:{variables['DMLC_PS_ROOT_PORT']}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("victim", "number", "message"),
    [
        ("server 0", signal.SIGKILL, "was killed by SIGKILL"),
        ("scheduler", signal.SIGKILL, "was killed by SIGKILL"),
        ("worker 1", signal.SIGSTOP, "stands still"),
    ],
)
def test_whatever_dies_or_stalls_ends_the_job(dist_flags, tmp_path, victim, number, message):
    stall_timeout = 3
    job = Job(dist_flags(epochs=SLOW, lr_steps=""), launcher=["--stall-timeout", stall_timeout])
    pids = job.pids()
    job.wait_for_update(tmp_path / "log" / "run", 7)
    os.kill(pids[victim], number)
    begin = time.monotonic()
    assert job.wait() == 1
    assert time.monotonic() - begin < END_SECONDS + stall_timeout
    assert re.search(rf"error: {victim} \((rank \d, )?process {pids[victim]}\) {message}", job.text), job.text
    assert not any(is_running(pid) for pid in pids.values())
    checkpoint, passed_over = find_latest(tmp_path / "model" / "run")
    assert checkpoint.epoch >= 1
    assert not passed_over


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_workers_with_one_checkpoint(dist_flags, tmp_path, number):
    job = Job(dist_flags(epochs=SLOW, lr_steps=""))
    job.wait_for_update(tmp_path / "log" / "run", 3)
    job.process.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(0.005)
        job.process.send_signal(number)  # as `timeout` passes on what the whole job got
    assert job.wait(timeout=30) == 128 + number
    assert job.text.count("--resume goes on") == 1
    assert "error" not in job.text
    assert find_latest(tmp_path / "model" / "run")[0].state.updates == updates(tmp_path / "log" / "run")


def test_killed_launcher_leaves_nothing_running(dist_flags, tmp_path):
    job = Job(dist_flags(epochs=SLOW, lr_steps=""))
    pids = job.pids()
    job.wait_for_update(tmp_path / "log" / "run", 1)
    job.process.kill()
    job.wait()
    deadline = time.monotonic() + END_SECONDS
    while any(is_running(pid) for pid in pids.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def fake_ssh(tmp_path):
    """A PATH whose `ssh` runs the line on this machine; it writes down every host that it was called for."""
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\necho "$1" >>{tmp_path}/hosts-called\n'
                      'shift\nexec sh -c "$*"\n')  # fmt: skip
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{script.parent}:{os.environ['PATH']}"}


def test_hosts_through_ssh(dist_flags, tmp_path, fake_ssh):
    (tmp_path / "hosts").write_text("alpha  # first\n\nuser@beta\n")
    launcher = ["--hosts", tmp_path / "hosts", "--address", "127.0.0.1", "--stall-timeout", 60]
    environment = {**fake_ssh, "DMLC_NODE_HOST": "127.0.0.1"}
    job = Job(dist_flags(epochs=SLOW, lr_steps=""), launcher=launcher, environment=environment)
    job.wait_for_update(tmp_path / "log" / "run", 3)
    assert sorted((tmp_path / "hosts-called").read_text().split()) == ["alpha", "alpha", "user@beta"]
    workers = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable} train_se_resnext.py.*{tmp_path}"], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    # Two machines, as far as the launcher knows: no processors to share.
    assert "LOCAL_WORLD_SIZE=1" in Path(f"/proc/{workers[0]}/environ").read_text().split("\0")
    os.kill(int(workers[0]), signal.SIGKILL)
    assert job.wait(timeout=END_SECONDS + 5) == 1
    assert re.search(r"error: worker \d \(rank \d, on (alpha|user@beta)\) was killed by SIGKILL", job.text), job.text
    time.sleep(0.5)
    assert not any(is_running(int(pid)) for pid in workers)


def test_a_host_that_ssh_cannot_reach_is_named(dist_flags, tmp_path, fake_ssh):
    (tmp_path / "hosts").write_text("alpha\n")
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\necho no route to alpha >&2\nexit 255\n")
    launcher = ["--hosts", tmp_path / "hosts", "--address", "127.0.0.1"]
    job = Job(dist_flags(lr_steps=""), launcher=launcher, environment=fake_ssh)
    assert job.wait(timeout=END_SECONDS) == 1
    assert re.search(r"error: (server|worker) \d \(on alpha\) was lost: ssh could not reach", job.text), job.text


def test_dist_async_learns_and_says_what_it_cannot_save(dist_flags, tmp_path):
    job = Job(dist_flags(kv_store="dist_async", epochs=4, lr=0.01, lr_steps="3", drop_out=0))
    assert job.wait() == 0, job.text
    assert "momentum" in job.text
    epochs = [line for line in read_lines(tmp_path / "log" / "run") if line["type"] == "epoch"]
    assert epochs[-1]["validation"]["loss"] < 0.6 * epochs[0]["train"]["loss"]
    assert not read_arrays(tmp_path / "model" / "run-0004.states")


def test_mistakes_of_the_training_command_are_not_tried_again(dist_flags):
    job = Job(dist_flags(batch_size=15, lr_steps=""), launcher=["--max-restarts", 3])
    assert job.wait() == 2
    assert job.text.count("--batch-size 15 cannot be shared by 2 processes") == 1
    assert "restart 1" not in job.text


def test_workers_need_a_launcher(train, train_flags, capfd):
    assert train(train_flags(kv_store="dist_sync")) == 2
    assert "training.launch" in capfd.readouterr().err


def test_a_failure_that_recurs_ends_after_the_last_restart():
    launch = [sys.executable, "-m", "training.launch", "-n", "2", "--max-restarts", "2", "--", "sh", "-c", "exit 3"]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("ended with exit status 3") == 3
    assert "restart 2 of 2" in done.stderr


def test_a_worker_does_not_train_alone(train, train_flags, capfd, monkeypatch):
    monkeypatch.setenv("DMLC_ROLE", "worker")
    assert train(train_flags()) == 2
    assert "add --kv-store dist_sync" in capfd.readouterr().err


def test_remote_command_keeps_every_character(tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    awkward = "a b'c\"$HOME;*"
    command = [
        sys.executable,
        "-c",
        "import os, sys; print(os.getcwd(), os.environ['X'], *sys.argv[1:], sep='|')",
        awkward,
    ]
    line = remote_command(command, {"X": awkward, "PYTHONPATH": str(ROOT)}, folder)
    shell = subprocess.Popen(["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell.stdout.read() == f"{folder}|{awkward}|{awkward}\n"
    shell.stdin.close()
    assert shell.wait() == 0


def test_bad_host_files_are_refused(tmp_path):
    path = tmp_path / "hosts"
    for content, message in (
        ("# none\n", "names no host"),
        ("-oProxyCommand=x\n", "is no host"),
        ("a b\n", "one a line"),
        ("\udcf8", "no text file"),
    ):
        path.write_text(content, errors="surrogateescape")
        with pytest.raises(UsageError, match=message):
            read_hosts(path)
    with pytest.raises(UsageError, match="No such file"):
        read_hosts(tmp_path / "missing")


def test_command_line_of_the_launcher():
    args = build_parser().parse_args(["-n", "2", "--", "python", "train.py", "-n", "3"])
    assert (args.workers, args.servers, args.command) == (2, 1, ["--", "python", "train.py", "-n", "3"])
    with pytest.raises(SystemExit):
        build_parser().parse_args(["-n", "0", "--", "x"])
