"""MXNet's `.params` files (NDArray lists) read and written with numpy alone.

    arrays = read_arrays("model-0050.params")            # {"arg:conv0_weight": float32 (64, 3, 7, 7), ...}
    write_arrays("model-0051.params", arrays)            # byte for byte what mx.nd.save writes

Layout, little-endian: u64 0x112, u64 0, u64 n, n arrays, u64 n_names (0 or n), each name u64 length + UTF-8
bytes. An array begins with a u32 that tells its version:

    V2 0xF993FAC9   i32 storage type (0 dense), shape, i32 device type, i32 device id, i32 dtype, raw data
    V3 0xF993FACA   the same, written under MXNet's np_shape semantics, where a shape may be () or hold zeros
    V1 0xF993FAC8   shape, device, dtype, data (no storage type)
    older           this u32 is the number of dimensions, then u32 per dimension, device, dtype, data

A shape is i32 ndim + ndim x i64. Before V3 ndim 0 means "no array" and nothing follows; it is read as
float32 (0,).

The reader believes no number in a file before it has compared it with the bytes that are there: memory is
allocated for an array only when its data is in the file.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from atomic_file import AtomicFile
from errors import UsageError

LIST_MAGIC = 0x112
V1_MAGIC = 0xF993FAC8
V2_MAGIC = 0xF993FAC9
V3_MAGIC = 0xF993FACA

# numpy has no bfloat16: its bits in one field, a type of its own that cannot be mistaken for uint16 numbers.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

# MXNet's type numbers. MXNet 1.9.1 itself creates 0 to 7 and 12; 8 to 11 are from its successors' list.
DTYPES = {
    0: np.dtype("<f4"),
    1: np.dtype("<f8"),
    2: np.dtype("<f2"),
    3: np.dtype("u1"),
    4: np.dtype("<i4"),
    5: np.dtype("i1"),
    6: np.dtype("<i8"),
    7: np.dtype("?"),
    8: np.dtype("<i2"),
    9: np.dtype("<u2"),
    10: np.dtype("<u4"),
    11: np.dtype("<u8"),
    12: BFLOAT16,
}
TYPE_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}

# cpu, gpu, pinned, shared; where an array lived does not matter here, but another number means damage.
DEVICE_TYPES = (1, 2, 3, 5)
STORAGE_TYPES = {1: "row_sparse", 2: "csr"}
MAX_DIMENSIONS = 32  # numpy's limit


class ParamsFileError(UsageError):
    """A `.params` file that is damaged or holds what is not read here; the message names the file."""


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray] | list[np.ndarray]:
    """Arrays of an NDArray list file: a dictionary in file order, or a list when the file holds no names.

    Every array is a fresh, writable, C-contiguous numpy array in native byte order; bfloat16 ones have the
    dtype `BFLOAT16` (see `bfloat16_to_float32`). Raises ParamsFileError for a file that is missing, damaged,
    sparse or of an unknown version.
    """
    try:
        with open(path, "rb") as file:
            return _read_list(_Source(file, os.fstat(file.fileno()).st_size, os.fspath(path)))
    except OSError as error:
        raise ParamsFileError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error


def read_arrays_from_bytes(data: bytes, name: str = "<bytes>") -> dict[str, np.ndarray] | list[np.ndarray]:
    """As `read_arrays`, from the content of a file; `name` is what error messages call it."""
    return _read_list(_Source(io.BytesIO(data), len(data), name))


def is_array_list(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as an NDArray list does; raises OSError."""
    with open(path, "rb") as file:
        return file.read(8) == struct.pack("<Q", LIST_MAGIC)


def read_array_from_bytes(data: bytes, name: str = "<bytes>") -> np.ndarray:
    """One array alone, without the list around it, as MXNet stores it inside pickles; as `read_arrays`."""
    source = _Source(io.BytesIO(data), len(data), name)
    array = _read_array(source, "the array")
    if source.remaining:
        raise source.error(f"{source.remaining} bytes follow the end of the array")
    return array


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    *,
    np_shape: bool = False,
) -> AtomicFile:
    """Write arrays as `mx.nd.save` does (device cpu(0)), atomically; returns the file, for its size and hash.

    arrays: name -> array in the order wanted, or a sequence (no names are stored). dtypes as in `DTYPES`;
    ml_dtypes' bfloat16 is accepted too. np_shape writes V3, the only version that can hold 0-dimensional
    arrays, which MXNet reads under `np_shape` only. Raises ValueError for what the format cannot hold.
    """
    with AtomicFile(path) as file:
        write_arrays_to(file, arrays, np_shape=np_shape)
    return file


def write_arrays_to_bytes(arrays: Mapping[str, np.ndarray] | Sequence[np.ndarray], *, np_shape: bool = False) -> bytes:
    """As `write_arrays`, returning the file's content."""
    file = io.BytesIO()
    write_arrays_to(file, arrays, np_shape=np_shape)
    return file.getvalue()


def write_arrays_to(
    file: BinaryIO | AtomicFile,
    arrays: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    *,
    np_shape: bool = False,
) -> None:
    """As `write_arrays`, into a binary file that is open; nothing is flushed or closed."""
    if isinstance(arrays, Mapping):
        names, values = list(arrays), list(arrays.values())
    else:
        names, values = [], list(arrays)
    file.write(struct.pack("<QQQ", LIST_MAGIC, 0, len(values)))
    for i, value in enumerate(values):
        _write_array(file, value, np_shape, repr(names[i]) if names else f"number {i}")
    file.write(struct.pack("<Q", len(names)))
    for name in names:
        raw = name.encode("utf-8")
        if b"\0" in raw:
            raise ValueError(f"the name {name!r} holds a NUL character, which MXNet cuts names at")
        file.write(struct.pack("<Q", len(raw)) + raw)


def bfloat16_to_float32(array: np.ndarray) -> np.ndarray:
    """float32 values of an array of dtype `BFLOAT16`; exact."""
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """`BFLOAT16` array of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    values = np.asarray(array, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN into infinity: keep its sign and set the quiet bit instead.
    rounded = np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return np.asarray(rounded).astype("<u2").view(BFLOAT16).reshape(values.shape)


class _Source:
    """Reads numbers from a file of known size; a read that would pass its end raises before it allocates."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file = file
        self.name = name
        self.remaining = size
        self.size = size

    def error(self, what: str) -> ParamsFileError:
        return ParamsFileError(f"{self.name}: {what} (at byte {self.size - self.remaining} of {self.size})")

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise self.error(f"the file ends inside {what}")
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f"the file got shorter while {what} was read")
        self.remaining -= count
        return data

    def numbers(self, layout: str, what: str) -> tuple:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}"), what))

    def fill(self, array: np.ndarray, what: str) -> None:
        """Read into a contiguous array whose size was compared with `remaining` before it was made."""
        view = memoryview(array.reshape(-1).view(np.uint8))
        if self.file.readinto(view) != view.nbytes:
            raise self.error(f"the file got shorter while {what} was read")
        self.remaining -= view.nbytes


def _read_list(source: _Source) -> dict[str, np.ndarray] | list[np.ndarray]:
    magic, _reserved, count = source.numbers("QQQ", "the file header")
    if magic != LIST_MAGIC:
        raise source.error(f"not an MXNet .params file: it begins with {magic:#x} instead of {LIST_MAGIC:#x}")
    if count > source.remaining // 4:  # the smallest array there is takes four bytes
        raise source.error(f"the header claims {count} arrays, more than fit in the file")
    arrays = [_read_array(source, f"array {i + 1} of {count}") for i in range(count)]
    (name_count,) = source.numbers("Q", "the number of names")
    if name_count not in (0, count):
        raise source.error(f"{name_count} names for {count} arrays")
    names = [_read_name(source, f"name {i + 1} of {count}") for i in range(name_count)]
    if source.remaining:
        raise source.error(f"{source.remaining} bytes follow the end of the list")
    if not names and arrays:
        return arrays
    named = dict(zip(names, arrays))
    if len(named) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise source.error(f"the name {twice!r} occurs twice")
    return named


def _read_name(source: _Source, what: str) -> str:
    (length,) = source.numbers("Q", what)
    raw = source.take(length, what)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise source.error(f"{what} is not UTF-8 text") from error


def _read_array(source: _Source, what: str) -> np.ndarray:
    (magic,) = source.numbers("I", what)
    if magic in (V2_MAGIC, V3_MAGIC):
        (storage,) = source.numbers("i", what)
        if storage != 0:
            kind = STORAGE_TYPES.get(storage)
            cause = f"is sparse ({kind})" if kind else "is of no known kind"
            raise source.error(f"{what} {cause}, storage type {storage}; only dense arrays are read")
    shape = _read_shape(source, magic, what)
    if shape is None:
        return np.empty((0,), np.float32)
    device_type, _device_id, type_number = source.numbers("iii", what)
    if device_type not in DEVICE_TYPES:
        raise source.error(f"{what} has the unknown device type {device_type}")
    if type_number not in DTYPES:
        raise source.error(f"{what} has the unknown dtype number {type_number}")
    return _read_data(source, shape, DTYPES[type_number], what)


def _read_shape(source: _Source, magic: int, what: str) -> tuple[int, ...] | None:
    """The shape that follows an array's first number; None for an array that was never given one."""
    if magic in (V1_MAGIC, V2_MAGIC, V3_MAGIC):
        (ndim,) = source.numbers("i", what)
        layout = "q"
    else:
        ndim, layout = (
            magic,
            "I",
        )  # the oldest files have no version number: this was the number of dimensions
    if magic == V3_MAGIC:
        unknown = ndim == -1
    else:
        unknown = ndim == 0
    if unknown:
        return None
    if not 0 <= ndim <= MAX_DIMENSIONS:
        if layout == "I":
            raise source.error(f"{what} has the unknown version number {magic:#x}")
        raise source.error(f"{what} claims {ndim} dimensions")
    shape = source.numbers(f"{ndim}{layout}", what)
    if magic == V3_MAGIC and -1 in shape:
        return None  # a dimension not known yet; MXNet writes no data for such an array
    if any(dimension < 0 for dimension in shape):
        raise source.error(f"{what} has the impossible shape {shape}")
    return shape


def _read_data(source: _Source, shape: tuple[int, ...], dtype: np.dtype, what: str) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize  # Python's integers do not overflow
    if nbytes > source.remaining:
        raise source.error(f"{what} of shape {shape} needs {nbytes} bytes, {source.remaining} are left")
    # A zero dimension makes any shape fit, but numpy refuses the other dimensions when they overflow.
    if math.prod(max(dimension, 1) for dimension in shape) * dtype.itemsize >= 2**63:
        raise source.error(f"{what} has the impossible shape {shape}")
    array = np.empty(shape, np.uint8 if dtype.kind == "b" else dtype)
    if nbytes:
        source.fill(array, what)
    if dtype.kind == "b":
        return array != 0  # a byte other than 0 and 1 must not become a boolean as it is
    return array if dtype is BFLOAT16 else array.astype(dtype.newbyteorder("="), copy=False)


def _write_array(file: BinaryIO | AtomicFile, value: np.ndarray, np_shape: bool, what: str) -> None:
    # asarray, not ascontiguousarray: that one turns 0 dimensions into 1.
    array = np.asarray(value, order="C")
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16).view(BFLOAT16)
    little = array.dtype if array.dtype == BFLOAT16 else array.dtype.newbyteorder("<")
    if little not in TYPE_NUMBERS:
        raise ValueError(f"array {what} has dtype {array.dtype}, which the .params format does not know")
    if array.ndim == 0 and not np_shape:
        raise ValueError(f"array {what} has 0 dimensions: MXNet reads that under np_shape only; reshape it to (1,)")
    file.write(
        struct.pack(
            f"<Iii{array.ndim}qiii",
            V3_MAGIC if np_shape else V2_MAGIC,
            0,  # dense
            array.ndim,
            *array.shape,
            1,  # cpu
            0,
            TYPE_NUMBERS[little],
        )
    )
    file.write(array.astype(little, copy=False).reshape(-1).view(np.uint8).data)
