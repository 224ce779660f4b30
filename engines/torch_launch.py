"""One process a device on this machine, by PyTorch's elastic launcher: what `--engine torch --gpus 0,1` starts.

On several machines torchrun does the same: torchrun --nnodes 2 --nproc-per-node 4 ... train_se_resnext.py ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from engines.group import PeerLost
from errors import ProjectError, UsageError
from training.heartbeat import RESTARTS_VARIABLES, STARTED_VARIABLE
from training.launch_processes import SIGNAL_EXIT_BASE, STOP_STATUSES, how_it_ended

SCRIPT = Path(__file__).resolve().parent.parent / "train_se_resnext.py"
# How long the processes that are left may take to end by themselves when one died, before they are killed.
SHUTDOWN_SECONDS = 4


def run_processes(argv: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run the training command with `argv` in so many processes; returns 0, or 128 + signal when it was stopped.

    A process that dies ends the others, and the job starts again from its newest checkpoint `max_restarts` times.
    Raises ProjectError, naming the rank and how it ended, after that. Returns 2 after a mistake of the user's, which a
    process has named and would make again.
    """
    # The agent reports every death at length; it is said below in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))
    shared = {
        "OMP_NUM_THREADS": threads, STARTED_VARIABLE: str(time.time()), RESTARTS_VARIABLES[0]: "0"
    }  # fmt: skip
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"train-{os.getpid()}", max_restarts=0, signals_to_handle="",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )  # fmt: skip
    received: list[int] = []
    with _environment(shared), _signals_passed_on(received):
        # The agent could start the processes again by itself, but would not say why.
        for attempt in range(max_restarts + 1):
            os.environ[RESTARTS_VARIABLES[0]] = str(attempt)
            try:
                launch_agent(config, sys.executable, [str(SCRIPT), *argv])
                break
            except ChildFailedError as error:
                status, what = _first_death(error)
                if received:
                    break
                if status in STOP_STATUSES or status == UsageError.exit_status:
                    return status
                if attempt == max_restarts:
                    raise ProjectError(f"{what}; the other processes were ended") from None
                print(f"{what}; restart {attempt + 1} of {max_restarts} from the newest checkpoint", file=sys.stderr)
    return SIGNAL_EXIT_BASE + received[0] if received else 0


def _first_death(error: ChildFailedError) -> tuple[int, str]:
    """Exit status of the process that ended the job, and a line that names it."""
    # The others noticed it and gave up, or the agent ended them.
    followed = (PeerLost.exit_status, -signal.SIGTERM)
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode in followed, item[1].timestamp))
    return failure.exitcode, f"rank {rank} (process {failure.pid}) {how_it_ended(failure.exitcode)}"


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
    """Let SIGTERM and SIGINT reach the training processes, which save and end; `received` tells what has come."""

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        training = children()
        for pid in training:
            os.kill(pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)
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
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            found.append(int(path.parent.name))
    return found
