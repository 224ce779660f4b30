"""RecordIO, the container of MXNet's image packs, without MXNet.

A record is `u32 magic`, `u32 cflag << 29 | length`, the data and zeros up to the next multiple of four. Where
the data itself holds the magic number at an aligned place it is cut there into parts (cflag 1 first, 2
middle, 3 last; the magic itself is left out), so an aligned magic number in a file always starts a part. An
image record's payload is a header `u32 flag, f32 label, u64 id, u64 id2`, `flag` float32 labels when flag >
0, then the image's bytes. A pack's `.idx` holds a line `key TAB offset` a record. All numbers are
little-endian.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import numbers
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Union

import numpy as np

from errors import ProjectError, UsageError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
# The length has 29 bits; the writer of MXNet refuses (or damages the file with) anything that does not fit.
MAX_PAYLOAD = 1 << 29

_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_HEADER_DTYPE = np.dtype(
    [("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")]
)
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
# One read usually gets a whole record; records that are larger than this cost a second read.
_READ_AHEAD = 256 * 1024
# A record without image: header and two labels, as the insightface packs use for ranges of keys.
_RANGE_PAYLOAD = _HEADER.size + 8

_log = logging.getLogger(__name__)

Payload = Union[bytes, memoryview]


class RecordError(UsageError):
    """A pack, its index or one of its records is damaged; the message names file, record and offset."""


class Header(NamedTuple):
    """Header of an image record; `label` is a float (flag 0) or a float32 array of `flag` labels."""

    flag: int
    label: float | np.ndarray
    id: int
    id2: int = 0


class Frame(NamedTuple):
    """Place of one record: its offset, its payload's length, the offset where the next record starts."""

    offset: int
    length: int
    end: int


def pack(header: Header, image: Payload) -> bytes:
    """Payload of an image record.

    A number as label goes into the header, a sequence behind it (flag = count).
    """
    if isinstance(header.label, numbers.Number):
        return _HEADER.pack(0, header.label, header.id, header.id2) + bytes(image)
    labels = np.asarray(header.label, dtype="<f4")
    return _HEADER.pack(labels.size, 0.0, header.id, header.id2) + labels.tobytes() + bytes(image)


def unpack(payload: Payload) -> tuple[Header, memoryview]:
    """Header and image bytes of a payload, not copied.

    RecordError when it is shorter than its header says.
    """
    view = memoryview(payload)
    if len(view) < _HEADER.size:
        raise RecordError(f"a record of {len(view)} bytes is too short for an image header ({_HEADER.size} bytes)")
    flag, label, id_, id2 = _HEADER.unpack_from(view)
    start = _HEADER.size + 4 * flag
    if start > len(view):
        raise RecordError(f"the header says {flag} labels, the record holds {len(view)} bytes")
    if flag:
        label = np.frombuffer(view, "<f4", flag, _HEADER.size)
    return Header(flag, label, id_, id2), view[start:]


def index_path_of(path: str | os.PathLike) -> Path:
    """Where a pack's index lies: beside it, with the ending .idx."""
    return Path(path).with_suffix(".idx")


class _Bytes:
    """Positioned reads of a file: no seek state, so any number of threads may read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UsageError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on, fewer only where the file ends."""
        try:
            data = os.pread(self._file.fileno(), length, offset)
            while 0 < len(data) < length and offset + len(data) < self.size:
                more = os.pread(self._file.fileno(), length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise ProjectError(f"{self.path}: cannot be read at offset {offset}: {error.strerror}") from None
        return data

    def close(self) -> None:
        self._file.close()


def _frame_at(data: bytes, first: bool) -> tuple[int, int]:
    """(cflag, length) of the part that `data` begins with; RecordError says what is wrong with it."""
    if len(data) < _FRAME.size:
        raise RecordError("the file ends inside a record")
    magic, word = _FRAME.unpack_from(data)
    if magic != MAGIC:
        raise RecordError(f"no record begins here (0x{magic:08X} instead of the magic number)")
    cflag, length = word >> 29, word & (MAX_PAYLOAD - 1)
    if cflag not in ((_WHOLE, _FIRST) if first else (_MIDDLE, _LAST)):
        where = "begins in the middle of a record" if first else "is cut off: another record follows its first part"
        raise RecordError(f"the record {where} (part kind {cflag})")
    return cflag, length


def _parts(source: _Bytes, offset: int, head: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) of every part of the record at `offset`; `head` is what was read there already."""
    cflag, length = _frame_at(head, first=True)
    total = length
    while True:
        if offset + _FRAME.size + length > source.size:
            missing = offset + _FRAME.size + length - source.size
            raise RecordError(f"the file ends {missing} bytes before the record does")
        yield offset + _FRAME.size, length
        if cflag in (_WHOLE, _LAST):
            return
        offset += _FRAME.size + (length + 3 & ~3)
        try:
            cflag, length = _frame_at(source.read(offset, _FRAME.size), first=False)
        except RecordError as error:
            raise RecordError(f"{error}, at its part at offset {offset}") from None
        total += len(MAGIC_BYTES) + length
        if total >= MAX_PAYLOAD:
            raise RecordError("the record's parts add up to 512 MiB or more")


def _frame(source: _Bytes, offset: int) -> Frame:
    parts = list(_parts(source, offset, source.read(offset, _FRAME.size)))
    length = sum(size for _, size in parts) + len(MAGIC_BYTES) * (len(parts) - 1)
    start, size = parts[-1]
    return Frame(offset, length, min(start + (size + 3 & ~3), source.size))


def scan(
    path: str | os.PathLike, damaged: Callable[[int, str], None] | None = None, anywhere: bool = False
) -> Iterator[Frame]:
    """Walk the records of a file without reading their data.

    At a place that is not framed as a record, RecordError is raised, naming record number and offset; or, with
    `damaged`, that is called with the offset and the reason, and the walk goes on where the next record begins.
    That is a multiple of four, where records lie; with `anywhere` any byte, for files that lost or gained some.
    """
    source = _Bytes(Path(path))
    number, offset, last = 0, 0, 0
    try:
        while offset < source.size:
            try:
                frame = _frame(source, offset)
            except RecordError as error:
                if damaged is None:
                    raise RecordError(f"{path}: record {number} at offset {offset}: {error}") from None
                damaged(offset, str(error))
                # A record that lost bytes reaches into the next one, which then begins before this place.
                here, offset = offset, _next_record(source, last + 1 if anywhere else offset + 4, anywhere)
                if offset == here:
                    offset = _next_record(source, here + 1, anywhere)
                last = offset
                continue
            yield frame
            last = frame.offset
            number, offset = number + 1, frame.end
    finally:
        source.close()


def _next_record(source: _Bytes, offset: int, anywhere: bool) -> int:
    """Where the first record at `offset` or behind it begins; the file's size when none does."""
    while offset < source.size:
        # A magic number that lies across two blocks is found in the first.
        block = source.read(offset, _READ_AHEAD + len(MAGIC_BYTES) - 1)
        place = block.find(MAGIC_BYTES)
        while place >= 0:
            with contextlib.suppress(RecordError):
                if (offset + place) % 4 == 0:
                    _frame_at(source.read(offset + place, _FRAME.size), first=True)
                    return offset + place
                if anywhere and _leads_on(source, offset + place):
                    return offset + place
            place = block.find(MAGIC_BYTES, place + 1)
        offset += _READ_AHEAD
    return source.size


def _leads_on(source: _Bytes, offset: int) -> bool:
    """Whether a whole record begins here and another one, or the file's end, follows; RecordError when none begins."""
    end = _frame(source, offset).end
    return end >= source.size or source.read(end, len(MAGIC_BYTES)) == MAGIC_BYTES


# What to do about a wrong index.
_REBUILD = "; python -m data_prep verify PACK --fix-index writes it anew"


def read_index(path: str | os.PathLike, pack_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets), int64, of an index in its own order, for a pack of `pack_bytes` bytes.

    Raises RecordError, naming the line, for anything but `key TAB offset` with an aligned offset inside the
    pack.
    """
    source = _Bytes(Path(path))
    try:
        # A record takes 8 bytes, a line 44 at most: a larger index is none, and is not worth the memory.
        if source.size > 64 * (pack_bytes // _FRAME.size + 1):
            raise RecordError(f"{path}: {source.size} bytes are too many for an index of a pack of {pack_bytes} bytes")
        lines = source.read(0, source.size).splitlines()
    finally:
        source.close()
    entries = np.empty((len(lines), 2), np.int64)
    for number, line in enumerate(lines):
        try:
            key, offset = line.split()
            entries[number] = int(key), int(offset)
        except (ValueError, OverflowError):
            shown = line[:60].decode(errors="replace")
            raise RecordError(
                f"{path}, line {number + 1}: expected `key TAB offset`, found {shown!r}{_REBUILD}"
            ) from None
    keys, offsets = entries[:, 0].copy(), entries[:, 1].copy()
    bad = np.flatnonzero((offsets < 0) | (offsets > pack_bytes - _FRAME.size) | (offsets % 4 != 0))
    if len(bad):
        offset = offsets[bad[0]]
        outside = not 0 <= offset <= pack_bytes - _FRAME.size
        cause = f"outside the pack ({pack_bytes} bytes; truncated?)" if outside else "no multiple of 4"
        raise RecordError(f"{path}, line {bad[0] + 1}: offset {offset} is {cause}{_REBUILD}")
    return keys, offsets


def _payload(source: _Bytes, offset: int, reach: int) -> memoryview:
    """Payload of the record at `offset`, which takes at most `reach` bytes of the file."""
    data = source.read(offset, min(reach, _READ_AHEAD))
    parts = list(_parts(source, offset, data))
    end = parts[-1][0] + parts[-1][1] - offset
    if len(data) < end:
        data += source.read(offset + len(data), end - len(data))
    view = memoryview(data)
    chunks = [view[start - offset : start - offset + length] for start, length in parts]
    return chunks[0] if len(chunks) == 1 else memoryview(MAGIC_BYTES.join(chunks))


class RecordReader:
    """Records of a file by their offsets, without an index; safe to use from many threads."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._source = _Bytes(Path(path))

    def read(self, frame: Frame) -> memoryview:
        """Payload of the record at `frame`, as `scan` gives it."""
        return _payload(self._source, frame.offset, frame.end - frame.offset)

    def close(self) -> None:
        self._source.close()


def is_range_record(payload: Payload) -> bool:
    """Whether an image record holds a range of keys instead of an image, as packs of the insightface kind do."""
    if len(payload) != _RANGE_PAYLOAD or _HEADER.unpack_from(payload)[0] != 2:
        return False
    first, last = struct.unpack_from("<2f", payload, _HEADER.size)
    return 1 <= first <= last


class RecordFile:
    """Random access to the records of a pack; nothing but the index is held in memory.

    Safe to use from many threads at once. Records are numbered in the index's order; without an index one is
    rebuilt in memory (keys 0, 1, ...) with a warning. Packs of the insightface kind hold records without
    image that list ranges of keys; they are left out (`range_records` says how many).
    """

    def __init__(self, path: str | os.PathLike, index_path: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        self.index_path = Path(index_path) if index_path is not None else index_path_of(path)
        self._source = _Bytes(self.path)
        try:
            if not self._source.size:
                raise UsageError(f"{self.path}: the file is empty")
            self._open_index(required=index_path is not None)
        except BaseException:
            self._source.close()
            raise

    def _open_index(self, required: bool) -> None:
        if required or self.index_path.exists():
            keys, offsets = read_index(self.index_path, self._source.size)
            if not len(offsets):
                raise RecordError(
                    f"{self.index_path}: the index is empty, its pack is not; delete it to have it rebuilt"
                )
        else:
            _log.warning("%s is missing: reading all of %s to rebuild it in memory", self.index_path, self.path)
            offsets = np.fromiter((frame.offset for frame in scan(self.path)), np.int64)
            keys = np.arange(len(offsets), dtype=np.int64)
        # How far a record reaches at most: up to the next one in the file.
        starts = np.append(np.unique(offsets), self._source.size)
        reach = starts[np.searchsorted(starts, offsets, side="right")] - offsets
        self.keys, self.offsets, self._reach = keys, offsets, reach
        self._check_last(int(np.argmax(offsets)))
        self.range_records = 0
        self._drop_range_records()

    def _check_last(self, index: int) -> None:
        """A truncated pack is refused here rather than hours later, when its last record is asked for."""
        try:
            frame = _frame(self._source, int(self.offsets[index]))
        except RecordError as error:
            raise self._error(index, error) from None
        if frame.end < self._source.size:
            _log.warning(
                "%s ends at offset %d of %d bytes: %s lists fewer records than the pack holds",
                self.path.name, frame.end, self._source.size, self.index_path,
            )  # fmt: skip

    def _drop_range_records(self) -> None:
        candidates = np.flatnonzero(self._reach == _FRAME.size + _RANGE_PAYLOAD)
        heads = [self._source.read(int(offset), _FRAME.size + _RANGE_PAYLOAD) for offset in self.offsets[candidates]]
        found = np.frombuffer(b"".join(heads), np.dtype([("head", _HEADER_DTYPE), ("range", "<f4", 2)]))
        head, (first, last) = found["head"], found["range"].T
        ranges = (head["flag"] == 2) & (head["word"] == _RANGE_PAYLOAD) & (first >= 1) & (first <= last)
        if not np.any(ranges & ((head["id"] == 0) | (self.keys[candidates] == 0))):
            return
        keep = np.ones(len(self.keys), bool)
        keep[candidates[ranges]] = False
        self.range_records = int(np.count_nonzero(~keep))
        self.keys, self.offsets, self._reach = self.keys[keep], self.offsets[keep], self._reach[keep]

    def __len__(self) -> int:
        return len(self.offsets)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._source.close()

    def where(self, index: int) -> str:
        """Name of a record for messages: file, number and offset."""
        return f"{self.path}: record {index} at offset {self.offsets[index]}"

    def _error(self, index: int, error: Exception) -> RecordError:
        return RecordError(f"{self.where(index)}: {error}")

    def read(self, index: int) -> memoryview:
        """Payload of record `index` (0 <= index < len); RecordError names the record when it is damaged."""
        try:
            return _payload(self._source, int(self.offsets[index]), int(self._reach[index]))
        except RecordError as error:
            raise self._error(index, error) from None

    def header(self, index: int) -> Header:
        """Header of record `index`, with its labels."""
        return self.unpack(index)[0]

    def unpack(self, index: int) -> tuple[Header, memoryview]:
        """Header and image bytes of record `index`; RecordError names the record when it is damaged."""
        payload = self.read(index)
        try:
            return unpack(payload)
        except RecordError as error:
            raise self._error(index, error) from None

    def labels(self) -> np.ndarray:
        """Labels of all records, read without the images: float32 (N,), or (N, k) for k > 1 labels each."""
        size = _HEADER_DTYPE.itemsize
        heads = b"".join(self._source.read(int(offset), size).ljust(size, b"\0") for offset in self.offsets)
        head = np.frombuffer(heads, _HEADER_DTYPE)
        # Whole records with one label are decoded at once; split or damaged ones and lists of labels one by
        # one.
        plain = (head["magic"] == MAGIC) & (head["word"] >> 29 == _WHOLE) & (head["word"] >= _HEADER.size)
        plain &= (head["flag"] == 0) & (head["word"] <= self._reach)
        rest = np.flatnonzero(~plain)
        if not len(rest):
            return head["label"].copy()
        several = [np.atleast_1d(np.asarray(self._read_labels(int(index)), np.float32)) for index in rest]
        width = len(several[0])
        wrong = [index for index, labels in zip(rest, several) if len(labels) != width]
        wrong += np.flatnonzero(plain)[:1].tolist() if width > 1 else []
        if wrong:
            raise RecordError(f"{self.where(min(wrong))}: another number of labels than record {rest[0]} ({width})")
        labels = np.empty((len(self), width), np.float32)
        labels[:, 0] = head["label"]
        labels[rest] = several
        return labels[:, 0] if width == 1 else labels

    def _read_labels(self, index: int) -> float | np.ndarray:
        """Labels of one record, without its image where the record is not split."""
        size = _FRAME.size + _HEADER.size
        head = self._source.read(int(self.offsets[index]), size)
        if len(head) == size:
            magic, word = _FRAME.unpack_from(head)
            flag, label = _HEADER.unpack_from(head, _FRAME.size)[:2]
            needed = _HEADER.size + 4 * flag
            if magic == MAGIC and needed <= word < MAX_PAYLOAD and word <= self._reach[index]:
                data = self._source.read(int(self.offsets[index]) + size, 4 * flag)
                return np.frombuffer(data, "<f4") if flag else label
        return self.header(index).label


class PartialRecord(NamedTuple):
    """A whole record of an interrupted pack: its key, where it ends in the pack and its line in the index."""

    key: int
    end: int
    index_end: int


def _partial_paths(path: Path) -> tuple[Path, Path]:
    """Where an unfinished pack and its index lie."""
    return Path(f"{path}.part"), Path(f"{index_path_of(path)}.part")


def partial_records(path: str | os.PathLike) -> Iterator[PartialRecord]:
    """Records that an interrupted RecordWriter of the pack `path` left whole, in the pack and in its index."""
    partial, partial_index = _partial_paths(Path(path))
    if not (partial.exists() and partial_index.exists()):
        return
    index_end = 0
    with open(partial_index, "rb") as lines:
        try:
            for frame, line in zip(scan(partial), lines):
                key, offset = map(int, line.split())
                # A last record without its padding is not whole either: what follows would not be aligned.
                if frame.end % 4 or not line.endswith(b"\n") or offset != frame.offset:
                    return
                index_end += len(line)
                yield PartialRecord(key, frame.end, index_end)
        except (RecordError, ValueError):
            # The place where the interruption cut one of the files.
            return


class RecordWriter:
    """Write a pack and its index, byte for byte as MXNet does; they get their names only when closed whole.

    Until then they are `PATH.part` beside their places. Leaving the `with` block by an exception deletes
    them, unless `keep_partial`. `start` continues such a partial pack behind the record that ends there (two
    ends of a PartialRecord); what follows it is cut off.
    """

    def __init__(self, path: str | os.PathLike, *, keep_partial: bool = False, start: tuple[int, int] = (0, 0)) -> None:
        self.path, self.index_path = Path(path), index_path_of(path)
        if self.path == self.index_path:
            raise UsageError(f"{path}: a pack cannot end in .idx, its index does")
        self._partial = _partial_paths(self.path)
        self._keep_partial = keep_partial
        self._end = start[0]
        self._files = []
        try:
            for partial, end in zip(self._partial, start):
                self._files.append(self._open(partial, end))
        except OSError as error:
            self._close_files()
            raise ProjectError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _open(self, partial: Path, end: int) -> BinaryIO:
        file = open(partial, "r+b" if end else "ab")  # noqa: SIM115 - closed by close() or abort()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ProjectError(f"{self.path}: another process is writing it") from None
        file.truncate(end)
        file.seek(end)
        return file

    def write(self, key: int, payload: Payload) -> int:
        """Append a record; returns its offset. Payloads of 512 MiB and more are refused with RecordError."""
        if len(payload) >= MAX_PAYLOAD:
            raise RecordError(
                f"{self.path}: record with key {key} has {len(payload)} bytes: "
                "RecordIO holds less than 512 MiB a record"
            )
        offset = self._end
        try:
            for piece in _framed(bytes(payload)):
                self._files[0].write(piece)
                self._end += len(piece)
            self._files[1].write(b"%d\t%d\n" % (key, offset))
        except OSError as error:
            raise ProjectError(f"{self.path}: cannot be written: {error.strerror}") from None
        return offset

    def flush(self) -> None:
        """Hand what was written to the system: from here on it survives the end of this process."""
        try:
            for file in self._files:
                file.flush()
        except OSError as error:
            raise ProjectError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Put pack and index, flushed to disk, in their places.

        No reader sees an old index with a new pack.
        """
        try:
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
            self.index_path.unlink(missing_ok=True)
            for partial, final in zip(self._partial, (self.path, self.index_path)):
                os.replace(partial, final)
        except OSError as error:
            raise ProjectError(f"{self.path}: cannot be written: {error.strerror}") from None

    def abort(self) -> None:
        """Give up: close the partial files, and delete them unless they are to be kept."""
        self._close_files()
        if not self._keep_partial:
            for partial in self._partial:
                partial.unlink(missing_ok=True)

    def _close_files(self) -> None:
        for file in self._files:
            # On a full disk what is buffered cannot be written; the cause was reported already.
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _framed(payload: bytes) -> Iterator[bytes]:
    """The pieces of a record as they stand in a file."""
    cuts = []
    place = payload.find(MAGIC_BYTES)
    while place >= 0:
        if place % 4 == 0:
            cuts.append(place)
        place = payload.find(MAGIC_BYTES, place + (4 if place % 4 == 0 else 1))
    start = 0
    for number, cut in enumerate(cuts):
        yield _FRAME.pack(MAGIC, (_MIDDLE if number else _FIRST) << 29 | cut - start)
        yield payload[start:cut]
        start = cut + len(MAGIC_BYTES)
    yield _FRAME.pack(MAGIC, (_LAST if cuts else _WHOLE) << 29 | len(payload) - start)
    yield payload[start:] if start else payload
    yield b"\0" * (-(len(payload) - start) % 4)
