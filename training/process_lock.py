"""A lock file that says who holds it, and that a dead holder does not keep."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from errors import UsageError


class ProcessLock:
    """Context manager: this process holds the lock file at `path`; a second holder gets a UsageError.

    The file names host, process id and start time. Three things are asked before it is refused: the kernel (a
    record lock, which ends with its process even when that is killed and which sees other containers on the
    same machine); whether the named process still lives; and whether it is the same one and not a later
    process with its number. A lock of another host cannot be looked into and is respected. instead: what
    a user who is refused should choose.
    """

    def __init__(self, path: str | os.PathLike[str], instead: str = "another prefix") -> None:
        self.path = Path(path)
        self._instead = instead
        self._descriptor: int | None = None

    def __enter__(self) -> ProcessLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            cause = error.strerror or error
            raise UsageError(f"cannot write the lock file {self.path}: {cause}; choose {self._instead}") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._descriptor is None:
            return
        # Removed while it is still locked, so that nobody can lock a file that is about to go; and only if
        # it is ours: the directory may have been deleted, and another run may have made it again.
        with contextlib.suppress(OSError):
            if self._is_in_place(self._descriptor):
                os.unlink(self.path)
        os.close(self._descriptor)
        self._descriptor = None

    def _acquire(self) -> None:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _lock_record(descriptor):
                    raise self._refusal(_read_holder(descriptor))
                # The holder before us may have removed the file between our open and our lock.
                if not self._is_in_place(descriptor):
                    os.close(descriptor)
                    continue
                holder = _read_holder(descriptor)
                if holder and _is_alive(holder):
                    raise self._refusal(holder)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_describe_self()).encode(), 0)
                os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                raise
            self._descriptor = descriptor
            return

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self, holder: dict) -> UsageError:
        who = "a run"
        if holder:
            who = f"process {holder['pid']} on {holder['host']}, started {holder['started']},"
        return UsageError(
            f"{who} is writing the same files: {self.path} is locked; choose {self._instead}, "
            "or remove that file if the run is gone"
        )


def _lock_record(descriptor: int) -> bool:
    """False when another process holds the lock; True on file systems that know no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _describe_self() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "process_start": _process_start(os.getpid()),
    }


def _read_holder(descriptor: int) -> dict:
    """What a lock file says; empty when it says nothing that can be read (its writer died in the first
    moment)."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return {
            "host": str(holder["host"]),
            "pid": int(holder["pid"]),
            "started": str(holder["started"]),
            "process_start": holder["process_start"],
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _is_alive(holder: dict) -> bool:
    """Whether the process that a lock file names may still be running."""
    if holder["host"] != socket.gethostname():
        return True
    if holder["pid"] <= 0:
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives, and belongs to somebody else
    start = _process_start(holder["pid"])
    return start is None or holder["process_start"] is None or start == holder["process_start"]


def _process_start(pid: int) -> str | None:
    """When process `pid` started (boot and clock ticks since then); None where /proc does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The command's name, in parentheses, may hold spaces and parentheses; the start time is field 22.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A killed process whose parent has not asked for its status is dead all the same.
        return "dead" if stat[0] in "ZX" else f"{boot} {stat[19]}"
    except (OSError, IndexError):
        return None
