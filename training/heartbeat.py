"""Signs of life that a worker sends to the launcher that started it: a datagram a batch, too cheap to notice.

What a launcher and its workers share, in environment variables, is declared here too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

# host:port where the launcher listens, and the number it gave the worker.
HEARTBEAT_VARIABLE, WORKER_VARIABLE = "TRAINING_HEARTBEAT", "TRAINING_WORKER"
# How often the job was started again (PyTorch's launcher has a variable of its own), and when it began, in seconds
# since 1970: checkpoints from before are not its own.
RESTARTS_VARIABLES, STARTED_VARIABLE = ("TRAINING_RESTARTS", "TORCHELASTIC_RESTART_COUNT"), "TRAINING_STARTED"
# Set by PyTorch's agent in every process that it starts.
TORCH_AGENT_VARIABLE = "TORCHELASTIC_RUN_ID"
# How many processes train on this machine; PyTorch's agent sets it, and our launcher.
LOCAL_PROCESSES_VARIABLE = "LOCAL_WORLD_SIZE"
# Process id of our launcher for PyTorch: a training process ends with it, even with one that died meanwhile.
LAUNCHER_VARIABLE = "TRAINING_LAUNCHER"
LOOPBACK = "127.0.0.1"
# Importing frameworks, reading data and checkpoints, the first batch: a process that starts may take longer than one
# that runs.
START_SECONDS = 600.0
# Silence after which a process counts as dead, unless a flag says otherwise.
STALL_SECONDS = 600.0


class Heartbeat:
    """Says to the launcher that the worker goes on; silent where no launcher asked for it. rank: of this process."""

    def __init__(self, rank: int = 0) -> None:
        self._socket: socket.socket | None = None
        host, _, port = os.environ.get(HEARTBEAT_VARIABLE, "").rpartition(":")
        if port.isdigit() and WORKER_VARIABLE in os.environ:
            self._target = (host, int(port))
            self._message = f"{os.environ[WORKER_VARIABLE]} {rank}".encode()
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def beat(self) -> None:
        """One sign of life; a network that loses it is no reason to stop."""
        if self._socket is not None:
            with contextlib.suppress(OSError, OverflowError):
                self._socket.sendto(self._message, self._target)


class Listener:
    """The launcher's end, for HEARTBEAT_VARIABLE. host: the address to listen at, "" for all of this machine's.

    One for every start of a job, at a port of its own: what processes of an earlier start have sent is not heard.
    """

    def __init__(self, host: str = LOOPBACK) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hear(self) -> Iterator[tuple[int, int]]:
        """(number, rank) for every sign of life that has come since."""
        while True:
            try:
                words = self._socket.recv(64).split()
                sign = int(words[0]), int(words[1])
            except BlockingIOError:
                return
            except (ValueError, IndexError):
                continue  # not from one of ours
            yield sign


def in_torch_job() -> bool:
    """Whether torchrun, or our own launcher for PyTorch, started this process."""
    return TORCH_AGENT_VARIABLE in os.environ and "RANK" in os.environ


def local_processes() -> int:
    """How many processes share this machine's processors for the training; 1 where no launcher started this one."""
    launched = in_torch_job() or WORKER_VARIABLE in os.environ
    return int(os.environ.get(LOCAL_PROCESSES_VARIABLE, "1")) if launched else 1


def restarted() -> bool:
    """Whether a launcher started this job again after a process died."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTARTS_VARIABLES)


def job_start() -> float:
    """When the job began, seconds since 1970; 0 when no launcher says."""
    return float(os.environ.get(STARTED_VARIABLE) or 0)
