"""Which of several processes has stalled, and signs of life, whatever the environment holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from training.heartbeat import START_SECONDS, Heartbeat, job_start, restarted
from training.launch_processes import StallClock, is_stopped, state_and_parent

LIMIT = 10.0
BOTH = ("a", "b")


def run(clock: StallClock, begin: float, end: float, *, heard=(), stopped=(), step: float = 1.0):
    """Look every `step` seconds; returns (time, process, why) for the first stall, None without."""
    now = begin
    while now <= end:
        stall = clock.find(now, BOTH, heard, stopped)
        if stall is not None:
            return now, *stall
        now += step
    return None


def test_the_silent_one_is_found():
    clock = StallClock(LIMIT)
    assert run(clock, 0, 30, heard=BOTH) is None
    assert run(clock, 31, 100, heard=["a"]) == (41, "b", "gave no sign of life for 10 s")


def test_a_start_may_take_longer():
    assert run(StallClock(LIMIT), 0, 2 * START_SECONDS, heard=["a"]) == (
        START_SECONDS + 1, "b", f"gave no sign of life for {START_SECONDS:g} s"
    )  # fmt: skip


def test_the_stopped_one_is_named_and_the_others_wait_for_it():
    clock = StallClock(LIMIT)
    run(clock, 0, 5, heard=BOTH)
    assert run(clock, 6, 15, stopped=["b"]) is None
    assert run(clock, 16, 25) is None  # it went on; nobody has been silent for long
    assert run(clock, 26, 60, stopped=["b"]) == (37, "b", "stands still (SIGSTOP)")


def test_a_short_stop_before_the_first_batch_is_none():
    clock = StallClock(LIMIT)
    assert run(clock, 0, 100) is None
    assert run(clock, 101, 105, stopped=["a"]) is None


def test_time_in_which_the_launcher_stood_still_does_not_count():
    clock = StallClock(LIMIT)
    run(clock, 0, 5, heard=BOTH)
    assert run(clock, 5 + 10 * LIMIT, 12 + 10 * LIMIT) is None
    assert run(clock, 13 + 10 * LIMIT, 30 + 10 * LIMIT)[1] == "a"


def test_processes_have_names_of_any_bytes():
    code = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'caf\\xe9) T 1'); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert state_and_parent(process.pid)[1] == os.getpid()
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while not is_stopped(process.pid):
            assert time.monotonic() < deadline
        process.kill()
    assert not is_stopped(process.pid)


@pytest.mark.parametrize("heartbeat", ["", "abc", "127.0.0.1:9", "127.0.0.1:99999", ":"])
@pytest.mark.parametrize("worker", [None, "0"])
def test_variables_that_are_left_over_do_no_harm(monkeypatch, heartbeat, worker):
    monkeypatch.setenv("TRAINING_HEARTBEAT", heartbeat)
    if worker is not None:
        monkeypatch.setenv("TRAINING_WORKER", worker)
    for name in ("TRAINING_RESTARTS", "TRAINING_STARTED", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
    Heartbeat().beat()
    assert not restarted()
    assert job_start() == 0
