"""One process a device on this machine, by PyTorch's elastic launcher: what `--engine torch --gpus 0,1` starts.

On several machines torchrun does the same: torchrun --nnodes 2 --nproc-per-node 4 ... train_se_resnext.py ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from engines.torch_group import OWN_LAUNCHER_VARIABLE
from errors import ProjectError, UsageError
from training.heartbeat import STARTED_VARIABLE
from training.launch_processes import SIGNAL_EXIT_BASE, how_it_ended

SCRIPT = Path(__file__).resolve().parent.parent / "train_se_resnext.py"
# How long the processes that are left may take to end by themselves when one died, before they are killed.
SHUTDOWN_SECONDS = 4


def run_processes(argv: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run the training command with `argv` in so many processes; returns 0, or 128 + signal when it was stopped.

    A process that dies ends the others, and the job starts again from its newest checkpoint `max_restarts` times.
    Raises ProjectError, naming the rank and how it ended, after that.
    """
    # The agent reports every death at length; it is said below in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ.update({STARTED_VARIABLE: str(time.time()), OWN_LAUNCHER_VARIABLE: str(os.getpid())})
    received = _pass_signals_on()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"train-{os.getpid()}", max_restarts=max_restarts, signals_to_handle="",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )  # fmt: skip
    try:
        launch_agent(config, sys.executable, [str(SCRIPT), *argv])
    except ChildFailedError as error:
        if received:
            return SIGNAL_EXIT_BASE + received[0]
        rank, failure = error.get_first_failure()
        kind = UsageError if failure.exitcode == UsageError.exit_status else ProjectError
        raise kind(
            f"rank {rank} (process {failure.pid}) {how_it_ended(failure.exitcode)}; the other processes were ended"
        ) from None
    return SIGNAL_EXIT_BASE + received[0] if received else 0


def _pass_signals_on() -> list[int]:
    """Let SIGTERM and SIGINT reach the training processes, which save and end; returns what has come, once it does."""
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        for pid in children():
            os.kill(pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return received


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
