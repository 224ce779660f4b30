"""Processes of a job: started here or on other machines through ssh, watched, and ended for certain.

Run as `python -m training.launch_processes COMMAND...` this is the other end of ssh: it starts COMMAND, passes signals
on that are named on its standard input, and kills it when that input ends. So nothing outlives its launcher, which a
process started by a bare ssh would.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from training.heartbeat import START_SECONDS

Key = TypeVar("Key", bound=Hashable)

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
SSH = ("ssh", "-o", "BatchMode=yes")
SSH_FAILED = 255
SIGNAL_EXIT_BASE = 128
# Launchers look at their processes several times in so many seconds, unless they are held up.
SUSPENDED_SECONDS = 2.0


class Member:
    """A process of the job. role: scheduler, server or worker; number: among those of its role; host: None for here.

    environment: variables that it gets besides those that are there. rank: what a worker says of itself, once it does.
    """

    def __init__(
        self, role: str, number: int, command: Sequence[str], environment: Mapping[str, str], host: str | None = None
    ) -> None:
        self.role, self.number, self.host = role, number, host
        self.rank: int | None = None
        if host is None:
            self.process = start_child(command, {**os.environ, **environment})
        else:
            self.process = subprocess.Popen(
                [*SSH, host, remote_command(command, environment, Path.cwd())],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        """`worker 1 (rank 0, process 4711)`, as messages name it."""
        rank = "" if self.rank is None else f"rank {self.rank}, "
        where = f"process {self.process.pid}" if self.host is None else f"on {self.host}"
        number = "" if self.role == "scheduler" else f" {self.number}"
        return f"{self.role}{number} ({rank}{where})"

    def exit_status(self) -> int | None:
        """0, the status that it ended with, or -N when signal N ended it; None while it runs."""
        status = self.process.poll()
        if status is not None and self.host is not None and SIGNAL_EXIT_BASE < status < SSH_FAILED:
            status = status if status in STOP_STATUSES else SIGNAL_EXIT_BASE - status
        return status

    def ending(self, status: int) -> str:
        """How it ended, in words; status: that of `exit_status`."""
        if self.host is not None and status == SSH_FAILED:
            return "was lost: ssh could not reach the machine, or the connection broke"
        return how_it_ended(status)

    def is_stopped(self) -> bool:
        """Whether it stands still by a signal (SIGSTOP); known on this machine only."""
        return self.host is None and is_stopped(self.process.pid)

    def ask_to_stop(self) -> None:
        """SIGTERM: finish the batch, save, end."""
        with contextlib.suppress(OSError):
            if self.host is None:
                self.process.send_signal(signal.SIGTERM)
            else:
                self.process.stdin.write(b"SIGTERM\n")
                self.process.stdin.flush()

    def kill(self) -> None:
        """End it and what it has started, and wait until it is gone."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# How the training command ends after SIGINT and SIGTERM.
STOP_STATUSES = (SIGNAL_EXIT_BASE + signal.SIGINT, SIGNAL_EXIT_BASE + signal.SIGTERM)


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine stands still by a signal (SIGSTOP)."""
    try:
        state, _ = state_and_parent(pid)
    except OSError:
        return False
    return state in ("T", "t")


def state_and_parent(pid: int) -> tuple[str, int]:
    """What the kernel says of a process; OSError when there is none. Its name may be any bytes, so it stays bytes."""
    state, parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:2]
    return state.decode(), int(parent)


def ended_at_once(signals: Sequence[int]) -> bool:
    """Whether the signals that a process has got ask for more than to save and end: a SIGINT after another one.

    A repeated SIGTERM does not: SLURM, systemd and others send it to all processes of a job, and launchers, `timeout`
    too, pass it on to those that have it already.
    """
    return signal.SIGINT in signals[1:]


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StallClock(Generic[Key]):
    """Finds the one of several processes, given by any keys, that has been silent for too long.

    limit: seconds without a sign of life; START_SECONDS, if they are more, before the first one.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._now: float | None = None
        self._silent: dict[Key, float] = {}  # since when
        self._stopped: dict[Key, float] = {}
        self._running: set[Key] = set()

    def find(
        self, now: float, alive: Collection[Key], heard: Collection[Key], stopped: Collection[Key]
    ) -> tuple[Key, str] | None:
        """The process to end and why, in words. now: seconds of a monotonic clock; heard: since the last call."""
        gap = 0.0 if self._now is None else now - self._now
        # After a longer one the launcher itself stood still, most likely with the whole job (`scontrol suspend`).
        slept = gap if gap > SUSPENDED_SECONDS else 0.0
        self._now = now
        self._silent = {key: now if key in heard else self._silent.get(key, now) + slept for key in alive}
        self._stopped = {key: self._stopped.get(key, now) + slept for key in stopped}
        self._running.update(heard)
        for key, since in self._stopped.items():
            if now - since > self._limit:
                return key, "stands still (SIGSTOP)"
        if self._stopped:
            # The others wait for it, which is no silence of theirs.
            self._silent = dict.fromkeys(alive, now)
            return None
        for key in sorted(alive, key=self._silent.__getitem__):
            limit = self._limit if key in self._running else max(self._limit, START_SECONDS)
            if now - self._silent[key] > limit:
                return key, f"gave no sign of life for {limit:g} s"
        return None


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def start_child(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a process in a session of its own, so that Ctrl-C does not reach it, which dies with this one."""
    parent = os.getpid()
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=lambda: die_with(parent))


def die_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which started it, ends in whatever way (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(SIGNAL_EXIT_BASE + signal.SIGKILL)


def remote_command(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> str:
    """The line that a remote shell gets: `command` under supervision, in the same folder, with `environment`."""
    variables = [f"{name}={value}" for name, value in sorted(environment.items())]
    line = ["env", *variables, python_of(command), "-m", "training.launch_processes", *command]
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(line)}"


def python_of(command: Sequence[str]) -> str:
    """The interpreter that `command` runs in; `python3` when that cannot be told."""
    return command[0] if Path(command[0]).name.startswith("python") else "python3"


def main(command: Sequence[str]) -> int:
    """Supervise `command` for a launcher at the other end of ssh; returns its status as a shell would."""
    child = start_child(command, os.environ)

    def obey() -> None:
        # Unbuffered, since a buffered reader that waits in another thread cannot be closed when we end.
        pending = b""
        while chunk := os.read(0, 256):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                child.send_signal(signal.Signals[line.decode()])
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=obey, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else SIGNAL_EXIT_BASE - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
