"""One process a device on this machine, by PyTorch's elastic launcher: what `--engine torch --gpus 0,1` starts.

On several machines torchrun does the same: torchrun --nnodes 2 --nproc-per-node 4 ... train_se_resnext.py ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from engines.group import PeerLost
from errors import ProjectError, UsageError
from training.heartbeat import (
    HEARTBEAT_VARIABLE,
    LAUNCHER_VARIABLE,
    LOOPBACK,
    RESTARTS_VARIABLES,
    STARTED_VARIABLE,
    WORKER_VARIABLE,
    Listener,
)
from training.launch_processes import (
    SIGNAL_EXIT_BASE,
    STOP_STATUSES,
    StallClock,
    ended_at_once,
    how_it_ended,
    is_stopped,
    processors,
    state_and_parent,
)

SCRIPT = Path(__file__).resolve().parent.parent / "train_se_resnext.py"
# How long the processes that are left may take to end by themselves when one died, before they are killed.
SHUTDOWN_SECONDS = 4
POLL_SECONDS = 0.5


def run_processes(argv: Sequence[str], processes: int, max_restarts: int, stall_timeout: float) -> int:
    """Run the training command with `argv` in so many processes; returns 0, or 128 + signal when it was stopped.

    A process that dies, or finishes no batch for `stall_timeout` seconds, ends the others, and the job starts again
    from its newest checkpoint `max_restarts` times. Raises ProjectError, naming the rank and how it ended, after that.
    Returns 2 after a mistake of the user's, which a process has named and would make again.
    """
    # The agent reports every death at length; it is said below in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, processors() // processes))
    shared = {
        "OMP_NUM_THREADS": threads, STARTED_VARIABLE: str(time.time()), WORKER_VARIABLE: "0",
        LAUNCHER_VARIABLE: str(os.getpid()),
    }  # fmt: skip
    received: list[int] = []
    with tempfile.TemporaryDirectory() as folder, _environment(shared), _signals_passed_on(received):
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id=f"train-{os.getpid()}", max_restarts=0, signals_to_handle="", shutdown_timeout=SHUTDOWN_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),  # PyTorch would leave its own folder behind
        )  # fmt: skip
        # The agent could start the processes again by itself, but would not say why.
        for attempt in range(max_restarts + 1):
            watch = _StallWatch(stall_timeout)
            own = {RESTARTS_VARIABLES[0]: str(attempt), HEARTBEAT_VARIABLE: f"{LOOPBACK}:{watch.port}"}
            try:
                with _environment(own), watch:
                    launch_agent(config, sys.executable, [str(SCRIPT), *argv])
                break
            except ChildFailedError as error:
                status, what = _first_death(error, watch.stalls)
                if received and (ended_at_once(received) or status in (*STOP_STATUSES, -signal.SIGTERM)):
                    break
                if status in STOP_STATUSES or status == UsageError.exit_status:
                    return status
                if received or attempt == max_restarts:
                    raise ProjectError(f"{what}; the other processes were ended") from None
                print(f"{what}; restart {attempt + 1} of {max_restarts} from the newest checkpoint", file=sys.stderr)
    return SIGNAL_EXIT_BASE + received[0] if received else 0


class _StallWatch(threading.Thread):
    """Kills a training process that finishes no batch for `limit` seconds, which PyTorch's agent then notices.

    port: where the processes send their signs of life. stalls: process -> what it was killed for.
    """

    def __init__(self, limit: float) -> None:
        super().__init__(daemon=True)
        self._listener = Listener()
        self._limit = limit
        self._over = threading.Event()
        self.port = self._listener.port
        self.stalls: dict[int, str] = {}

    def __enter__(self) -> _StallWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        with self._listener:
            self._watch()

    def _watch(self) -> None:
        clock: StallClock[int] = StallClock(self._limit)
        while not self._over.wait(POLL_SECONDS):
            ranks = {rank for _, rank in self._listener.hear()}
            training = {pid: rank for pid in children() if (rank := rank_of(pid)) is not None}
            heard = [pid for pid, rank in training.items() if rank in ranks]
            stall = clock.find(time.monotonic(), training, heard, [pid for pid in training if is_stopped(pid)])
            if stall is None:
                continue
            pid, how = stall
            self.stalls[pid] = how
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            clock = StallClock(self._limit)  # the others, which waited for it, are about to end


def _first_death(error: ChildFailedError, stalls: Mapping[int, str]) -> tuple[int, str]:
    """Exit status of the process that ended the job, and a line that names it."""
    # The others noticed it and gave up, or the agent ended them.
    followed = (PeerLost.exit_status, -signal.SIGTERM)
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode in followed, item[1].timestamp))
    how = stalls.get(failure.pid) or how_it_ended(failure.exitcode)
    return failure.exitcode, f"rank {rank} (process {failure.pid}) {how}"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while; PyTorch's agent hands this process's own on."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _signals_passed_on(received: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGINT reach the training processes, which save and end; `received` tells what has come.

    A SIGINT after another signal ends them at once.
    """

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        training = children()
        for pid in training:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if ended_at_once(received) else signal.SIGTERM)
        if not training:
            # None has been started yet, or all have ended; those to come would not hear of it.
            raise SystemExit(SIGNAL_EXIT_BASE + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def children() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(path.name)
            if state_and_parent(pid)[1] == os.getpid():
                found.append(pid)
    return found


def rank_of(pid: int) -> int | None:
    """The rank that PyTorch's agent gave to a process; None where it has none, or has ended."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = (variable[5:] for variable in variables if variable.startswith(b"RANK="))
    return next((int(rank) for rank in found if rank.isdigit()), None)
