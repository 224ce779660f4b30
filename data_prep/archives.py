"""Members of tar files, also of tar files inside tar files, as stretches of the outer file.

Nothing is unpacked.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import Stretch
from errors import UsageError

TAR_SUFFIX = ".tar"


class _Window(io.RawIOBase):
    """A stretch of a file as a file, by positioned reads."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._place = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        data = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._place)
        self._place += len(data)
        return data


def tar_members(path: Path, shown: str | None = None, part: Stretch | None = None) -> Iterator[Stretch]:
    """Regular files of the tar file at `path`, in its order; of the inner tar file `part` when one is given.

    `shown` is how lists name the archive. Only headers are read and none is kept, so memory does not grow
    with the archive. UsageError names an archive that is compressed, damaged or cut off.
    """
    name = f"{path}: {part.name}" if part else str(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        offset, length = (part.offset, part.length) if part else (0, os.fstat(descriptor).st_size)
        window = _Window(descriptor, offset, length)
        try:
            with tarfile.open(fileobj=window, mode="r:") as archive:
                for member in archive:
                    # tarfile remembers every member it has seen: hundreds of megabytes for ImageNet.
                    archive.members = []
                    if not member.isreg():
                        continue
                    if member.sparse is not None or member.offset_data + member.size > length:
                        raise UsageError(f"{name}: cut off or sparse inside {member.name}")
                    yield Stretch(shown or str(path), offset + member.offset_data, member.size, member.name)
                end = archive.offset
        except (tarfile.TarError, OSError) as error:
            raise UsageError(f"{name}: not an uncompressed tar file ({error})") from None
        # tarfile takes a file that stops between or inside headers for a complete one.
        window.seek(end)
        if window.read(tarfile.BLOCKSIZE).strip(b"\0") or end >= length:
            raise UsageError(f"{name}: cut off or damaged at offset {end}: the end of the archive is missing")
    finally:
        os.close(descriptor)
