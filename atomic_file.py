"""Files that appear under their name only when complete: written beside it, flushed to disk, renamed.

This is the one place that does so; every room may import it (it imports nothing of the project).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


def temporary_pattern(name: str) -> str:
    """Glob pattern of the unfinished files that writers killed while writing `name` can leave beside it."""
    return f".{name}.*.tmp"


class AtomicFile:
    """A binary file under a temporary name in the same directory until `commit` renames it to `path`.

    Use it as a context manager (leaving commits, an exception discards) or call `commit` or `discard` once.
    `size` (bytes) and `sha256()` (hexadecimal) describe what was written so far, so nobody reads it again.
    Errors are the operating system's (OSError); after one nothing of the file is left and an existing file at
    `path` is as it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # The process id keeps two processes that write the same name apart; O_EXCL is not wanted, because a
        # leftover of a dead process with a reused id must not stop us.
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.size = 0
        self._hash = hashlib.sha256()
        # Closed by `commit` or `discard`.
        # Closed by `commit` or `discard`.
        self._file = open(self.temporary, "wb")  # noqa: SIM115

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data` (anything with a contiguous buffer); returns its length in bytes."""
        view = memoryview(data)
        if not view.nbytes:
            return 0  # an empty view cannot be cast
        view = view.cast("B")
        self._file.write(view)
        self._hash.update(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Offset of the next byte."""
        return self.size

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def complete(self) -> None:
        """Close the file, all of it flushed to disk, still under its temporary name."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def commit(self) -> None:
        """Make the file appear at `path`, complete and on disk; discards it when that fails."""
        try:
            self.complete()
            os.replace(self.temporary, self.path)
        except BaseException:
            self.discard()
            raise
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove what was written; an existing file at `path` stays as it was."""
        # Closing flushes, which fails again on a full disk: the error that led here is the one to tell.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


class AtomicFiles:
    """Several files that belong together: none appears under its name before all are complete on disk.

    A context manager; `open` adds a file. They are renamed in the order in which they were opened, so a
    reader that finds the last one in place finds all of them. An exception discards all, and so does a file
    that cannot be completed.
    """

    def __init__(self) -> None:
        self.files: list[AtomicFile] = []

    def open(self, path: str | os.PathLike[str]) -> AtomicFile:
        """A new member of the set, to be written by the caller."""
        self.files.append(AtomicFile(path))
        return self.files[-1]

    def __enter__(self) -> AtomicFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        try:
            if kind is None:
                for file in self.files:
                    file.complete()
                for file in self.files:
                    file.commit()
        finally:
            # Nothing is left to discard of a file that was renamed.
            for file in self.files:
                file.discard()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at `path` by `data`, atomically and flushed to disk."""
    with AtomicFile(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, atomically and flushed to disk."""
    write_bytes(path, text.encode("utf-8"))


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Flush a directory, so that a rename in it survives a power cut; nothing where that is not possible."""
    # Some network and Windows file systems cannot open or flush a directory: the rename itself has happened.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
