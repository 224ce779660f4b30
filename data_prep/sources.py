"""Where the bytes of an image lie: a file below a root folder, or a stretch of an uncompressed tar file.

In a list the second kind is written `ARCHIVE::OFFSET::LENGTH::NAME`: nothing is unpacked, any image can be
read at once, and a list of a million of them needs no table in memory.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

_SEPARATOR = "::"
_OPEN_ARCHIVES = 32


class SourceError(Exception):
    """An image's bytes cannot be read; the message is the reason alone."""


class Stretch(NamedTuple):
    """A member of an archive: the archive's path, offset and length of its data in it, its name."""

    archive: str
    offset: int
    length: int
    name: str

    def __str__(self) -> str:
        return _SEPARATOR.join(map(str, self))


def parse_stretch(path: str) -> Stretch | None:
    """The stretch that a list's path names, or None for the path of a file."""
    fields = path.split(_SEPARATOR, 3)
    if len(fields) == 4 and fields[1].isdigit() and fields[2].isdigit():
        return Stretch(fields[0], int(fields[1]), int(fields[2]), fields[3])
    return None


def read_source(root: str, path: str) -> bytes:
    """All bytes of an image of a list; SourceError says why not."""
    stretch = parse_stretch(path)
    try:
        if stretch is None:
            with open(os.path.join(root, path), "rb") as file:
                return file.read()
        data = os.pread(_archive(os.path.join(root, stretch.archive)), stretch.length, stretch.offset)
    except FileNotFoundError:
        raise SourceError("no such file") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) != stretch.length:
        raise SourceError(f"the archive ends inside the image ({len(data)} of {stretch.length} bytes)")
    return data


@lru_cache(maxsize=_OPEN_ARCHIVES)
def _archive(path: str) -> int:
    """A descriptor of the archive, kept for the life of the process.

    ImageNet has few of them, and large ones.
    """
    return os.open(path, os.O_RDONLY)
