"""Runs that are killed, stopped or lose their disk: nothing is lost and nothing changes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, read_lines, start_training, without_times
from engines.symbol_engine import SymbolEngine
from training.checkpoint import find_latest

KILLS = 20


def wait_for(condition, process, timeout: float = 120.0):
    """Wait until `condition()` is true; fails when the process ends before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def trained_updates(log_dir) -> int:
    try:
        return max((line.get("update", 0) for line in read_lines(log_dir)), default=0)
    except (FileNotFoundError, ValueError):
        return 0


def test_killed_twenty_times_ends_with_the_same_bits(train_flags, tmp_path):
    flags = {
        "epochs": 3,
        "batch_size": 3,
        "save_every": 2,
        "frequent": 1,
        "drop_out": 0.2,
        "cpus": 1,
        "lr_steps": "1,2",
    }
    straight = start_training(train_flags("straight", **flags), threads=2, stderr=-1, text=True)
    assert straight.wait(timeout=300) == 0, straight.communicate()[1]
    rng, log = random.Random(0), tmp_path / "log" / "killed"
    for _ in range(KILLS):
        process = start_training(train_flags("killed", resume=True, **flags), threads=2, stderr=-1, text=True)
        # While it starts, or some updates later: in a batch, in a save, between two lines of the log.
        more = rng.choice([0, 1, 2, 3])
        if more:
            goal = trained_updates(log) + more
            wait_for(lambda goal=goal: trained_updates(log) >= goal, process)
        time.sleep(rng.uniform(0, 0.03 if more else 1.0))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    last = start_training(train_flags("killed", resume=True, **flags), threads=2, stderr=-1, text=True)
    assert last.wait(timeout=300) == 0, last.communicate()[1]
    for extension in ("params", "states"):
        name = f"0003.{extension}"
        assert (tmp_path / "model" / f"straight-{name}").read_bytes() == (
            tmp_path / "model" / f"killed-{name}"
        ).read_bytes()
    assert without_times(read_lines(tmp_path / "log" / "straight")) == without_times(
        read_lines(tmp_path / "log" / "killed")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_batch_saves_and_exits(train_flags, tmp_path, number):
    log = tmp_path / "log" / "run"
    process = start_training(train_flags(epochs=500, lr_steps="", frequent=1, batch_size=6), stderr=-1, text=True)
    wait_for(lambda: trained_updates(log) >= 3, process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "--resume goes on" in error
    assert "Traceback" not in error
    checkpoint, passed_over = find_latest(tmp_path / "model" / "run")
    assert not passed_over
    assert checkpoint.state.updates == trained_updates(log)


def test_only_ctrl_c_ends_a_run_that_is_stopping_at_once():
    code = """
import os, signal
from engines.group import Group
from training.loop import StopRequest
with StopRequest(Group()) as stop:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        print(stop.signal)
"""
    done = subprocess.run([sys.executable, "-uc", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout.split() == [str(int(signal.SIGTERM))] * 2, done.stderr


def test_signal_ends_a_validation_which_a_resumed_run_repeats(train, train_flags, tmp_path, monkeypatch):
    assert train(train_flags("straight", lr_steps="")) == 0
    predict = SymbolEngine.predict

    def predict_and_signal(engine, batch):
        monkeypatch.setattr(SymbolEngine, "predict", predict)
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(engine, batch)

    monkeypatch.setattr(SymbolEngine, "predict", predict_and_signal)
    assert train(train_flags("parts", lr_steps="")) == 128 + signal.SIGTERM
    checkpoint, _ = find_latest(tmp_path / "model" / "parts")
    assert (checkpoint.epoch, checkpoint.batch) == (0, 6)
    assert train(train_flags("parts", lr_steps="", resume=True)) == 0
    straight, parts = (without_times(read_lines(tmp_path / "log" / name)) for name in ("straight", "parts"))
    assert straight == parts


def test_second_run_of_a_prefix_is_refused(train, train_flags, tmp_path, capfd):
    process = start_training(train_flags(epochs=500, lr_steps="", frequent=1), stderr=-1, text=True)
    wait_for(lambda: trained_updates(tmp_path / "log" / "run") >= 1, process)
    assert train(train_flags(resume=True)) == 2
    error = capfd.readouterr().err
    assert str(process.pid) in error
    # Nor may another prefix write into its log.
    assert train(train_flags(model_prefix=tmp_path / "model" / "other")) == 2
    error = capfd.readouterr().err
    assert str(process.pid) in error
    assert "another --log-dir" in error
    process.kill()
    process.wait()
    # The lock of a dead process does not keep anybody out.
    assert train(train_flags("run", epochs=1, lr_steps="", overwrite=True)) == 0


def test_deleted_checkpoint_directory_does_not_end_the_run(train_flags, tmp_path):
    log = tmp_path / "log" / "run"
    argv = train_flags(epochs=40, lr_steps="", frequent=1, batch_size=6, cpus=1)
    process = start_training(argv, stderr=-1, text=True)
    wait_for(lambda: (tmp_path / "model" / "run-0001.json").exists(), process)
    # The run may be writing there at this moment, and what it renames cannot be deleted by its old name.
    while (tmp_path / "model").exists():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
    seen = trained_updates(log)
    wait_for(lambda: trained_updates(log) >= seen + 30, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "has vanished" in process.communicate()[1]
    assert find_latest(tmp_path / "model" / "run")[0] is not None


def test_checkpoints_that_cannot_be_written_do_not_end_the_run(train_flags, tmp_path):
    log = tmp_path / "log" / "run"
    argv = train_flags(epochs=60, lr_steps="", frequent=1, batch_size=6, cpus=1)
    process = start_training(argv, stderr=-1, text=True)
    wait_for(lambda: (tmp_path / "model" / "run-0001.json").exists(), process)
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "model").write_text("in the way")
    seen = trained_updates(log)
    wait_for(lambda: trained_updates(log) >= seen + 30, process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    # Everything was trained as asked, but the user must not believe that it was saved.
    assert process.returncode == 1
    assert "the training goes on" in error
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert find_latest(tmp_path / "moved" / "run")[0] is not None


def test_damaged_newest_checkpoint_is_named_and_passed_over(train, train_flags, tmp_path, capfd):
    assert train(train_flags(epochs=2, lr_steps="")) == 0
    newest = tmp_path / "model" / "run-0002.params"
    newest.write_bytes(newest.read_bytes()[:-1])
    for path in (tmp_path / "model").glob("run-best.*"):
        path.unlink()
    capfd.readouterr()
    assert train(train_flags(epochs=2, lr_steps="", resume=True)) == 0
    error = capfd.readouterr().err
    assert "passed over" in error
    assert "run-0002" in error
    assert "continuing from run-0001" in error


def test_keep_leaves_the_newest_and_the_best(train, train_flags, tmp_path):
    assert train(train_flags(epochs=4, lr_steps="", keep=2)) == 0
    assert sorted(path.name for path in (tmp_path / "model").glob("*.params")) == [
        "run-0003.params",
        "run-0004.params",
        "run-best.params",
    ]
