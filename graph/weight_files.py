"""Named arrays from the files in which other projects publish weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from errors import UsageError
from graph.params_file import BFLOAT16, bfloat16_to_float32, read_arrays

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
# Keys under which training scripts keep the state_dict beside other things, best first.
WRAPPERS = ("state_dict_ema", "state_dict", "model", "net")
# Prefixes that wrappers of a whole network put before every name.
NAME_PREFIXES = ("module.", "model.", "_orig_mod.")

SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name from MXNet's `.params`, PyTorch's `.pth`/`.pt`/`.bin`/`.tar` or `.safetensors`.

    Floating point numbers come as float32. Raises UsageError for a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".params":
        arrays = read_arrays(path)
        if not isinstance(arrays, dict):
            raise UsageError(f"{path}: its arrays have no names")
    elif path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        arrays = _read_torch(path)
    else:
        known = ", ".join([".params", ".safetensors", *TORCH_SUFFIXES])
        raise UsageError(f"{path}: weights are read from files that end in one of {known}")
    return {_without_prefix(name, arrays): _as_float32(array) for name, array in arrays.items()}


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """A state_dict; nothing but tensors and plain containers is unpickled."""
    try:
        import torch
    except ImportError:
        raise UsageError(
            f"{path}: needs PyTorch to be read: pip install -r requirements-torch.txt, or take .safetensors"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damaged bytes lead to
        raise UsageError(f"{path}: is no PyTorch state_dict ({str(error).splitlines()[0][:120]})") from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"{path}: is no PyTorch state_dict (a mapping from names to tensors)")
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in content.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """u64 length, JSON {name: {dtype, shape, data_offsets}}, data; little-endian."""
    data = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > len(data) - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        body = memoryview(data)[8 + length :]
        return {name: _safetensor(body, entry) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is no safetensors file ({error})") from None


def _safetensor(body: memoryview, entry: dict) -> np.ndarray:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(body):
        raise ValueError("an array lies outside the file")
    return np.frombuffer(body[begin:end], SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])


def _without_prefix(name: str, names: dict) -> str:
    for prefix in NAME_PREFIXES:
        if all(other.startswith(prefix) for other in names):
            return name[len(prefix) :]
    return name


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == BFLOAT16:
        return bfloat16_to_float32(array)
    return array.astype(np.float32) if array.dtype.kind == "f" else array
