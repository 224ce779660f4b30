"""MXNet's `.params` format: MXNet's bytes, all versions and dtypes, no trust in claims."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest

from graph.params_file import (
    BFLOAT16,
    DTYPES,
    ParamsFileError,
    bfloat16_to_float32,
    float32_to_bfloat16,
    read_arrays,
    read_arrays_from_bytes,
    write_arrays,
    write_arrays_to_bytes,
)

V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
# The dtypes that MXNet 1.9.1 creates; the format has more numbers.
MXNET_DTYPES = ["float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool"]


def list_file(*arrays: bytes, names: tuple[bytes, ...] = (), count: int | None = None) -> bytes:
    """An NDArray list from the bytes of its arrays."""
    data = struct.pack("<QQQ", 0x112, 0, len(arrays) if count is None else count) + b"".join(arrays)
    data += struct.pack("<Q", len(names))
    return data + b"".join(struct.pack("<Q", len(name)) + name for name in names)


def context(dtype: int, device: int = 1) -> bytes:
    return struct.pack("<iii", device, 0, dtype)


def sample(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits as an array of `dtype`; for floats these include NaNs, infinities and denormals."""
    rng = np.random.default_rng(7)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, count, dtype=np.uint8).view(dtype).reshape(shape)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()
    assert actual.flags.writeable
    assert actual.flags.c_contiguous


# ---------------------------------------------------------------------------- against MXNet


@pytest.fixture(scope="module")
def mx():
    return pytest.importorskip("mxnet_compat", exc_type=ImportError).mx


def mxnet_bytes(mx, tmp_path, arrays) -> bytes:
    mx.nd.save(str(tmp_path / "mxnet.params"), arrays)
    return (tmp_path / "mxnet.params").read_bytes()


def mixed_arrays() -> dict[str, np.ndarray]:
    shapes = [(3,), (2, 3), (4, 3, 2, 2), (1, 1, 1, 1, 5), (0,), (2, 0, 3)]
    return {
        f"arg:{dtype}_{i}": sample(np.dtype(dtype), shape) for i, shape in enumerate(shapes) for dtype in MXNET_DTYPES
    }


def test_same_bytes_as_mxnet_for_every_dtype(mx, tmp_path):
    arrays = mixed_arrays()
    theirs = mxnet_bytes(mx, tmp_path, {k: mx.nd.array(v, dtype=v.dtype) for k, v in arrays.items()})
    assert write_arrays_to_bytes(arrays) == theirs


def test_reads_what_mxnet_writes(mx, tmp_path):
    arrays = mixed_arrays()
    mxnet_bytes(mx, tmp_path, {k: mx.nd.array(v, dtype=v.dtype) for k, v in arrays.items()})
    back = read_arrays(tmp_path / "mxnet.params")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert_same(back[name], array)


def test_mxnet_reads_what_we_write(mx, tmp_path):
    arrays = mixed_arrays()
    write_arrays(tmp_path / "ours.params", arrays)
    back = mx.nd.load(str(tmp_path / "ours.params"))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype.type
        assert back[name].shape == array.shape
        assert back[name].asnumpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lists_without_names(mx, tmp_path, count):
    arrays = [np.full((i + 1,), i, np.float32) for i in range(count)]
    ours = write_arrays_to_bytes(arrays)
    assert ours == mxnet_bytes(mx, tmp_path, [mx.nd.array(a) for a in arrays])
    back = read_arrays_from_bytes(ours)
    assert len(back) == count
    for a, b in zip(back, arrays):
        assert_same(a, b)


def test_names_beyond_ascii(mx, tmp_path):
    arrays = {"arg:größe": np.ones((1,), np.float32), "": np.zeros((2,), np.float32)}
    theirs = mxnet_bytes(mx, tmp_path, {k: mx.nd.array(v) for k, v in arrays.items()})
    assert write_arrays_to_bytes(arrays) == theirs
    assert list(read_arrays_from_bytes(theirs)) == list(arrays)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_np_shape_semantics_are_v3(mx, tmp_path, shape):
    array = sample(np.dtype(np.float32), shape)
    with mx.util.np_shape(True):
        theirs = mxnet_bytes(mx, tmp_path, {"a": mx.nd.array(array)})
        assert write_arrays_to_bytes({"a": array}, np_shape=True) == theirs
        (tmp_path / "ours.params").write_bytes(theirs)
        assert mx.nd.load(str(tmp_path / "ours.params"))["a"].shape == shape
    assert_same(read_arrays_from_bytes(theirs)["a"], array)


def test_mxnet_reads_our_bfloat16_bits(mx, tmp_path):
    values = np.array([[1.0, -2.5, 3.140625]], np.float32)
    write_arrays(tmp_path / "ours.params", {"a": float32_to_bfloat16(values)})
    loaded = mx.nd.load(str(tmp_path / "ours.params"))
    again = mxnet_bytes(mx, tmp_path, loaded)
    assert again == (tmp_path / "ours.params").read_bytes()
    assert loaded["a"].astype("float32").asnumpy().tolist() == values.tolist()


def test_mxnet_and_we_agree_on_the_old_versions(mx, tmp_path):
    data = np.arange(6, dtype="<f4").tobytes()
    for array in (
        struct.pack("<Iiqq", V1, 2, 2, 3) + context(0) + data,
        struct.pack("<III", 2, 2, 3) + context(0, device=2) + data,
    ):
        path = tmp_path / "old.params"
        path.write_bytes(list_file(array, names=(b"arg:a",)))
        assert_same(read_arrays(path)["arg:a"], mx.nd.load(str(path))["arg:a"].asnumpy())


def test_sparse_arrays_of_mxnet_are_refused(mx, tmp_path):
    for kind in ("row_sparse", "csr"):
        data = mxnet_bytes(mx, tmp_path, {"a": mx.nd.ones((2, 3)).tostype(kind)})
        with pytest.raises(ParamsFileError, match=kind):
            read_arrays_from_bytes(data)


# ---------------------------------------------------------------------------- without MXNet


@pytest.mark.parametrize("number", sorted(DTYPES))
@pytest.mark.parametrize("version", ["v3", "v2", "v1", "old"])
def test_every_dtype_in_every_version(version, number):
    dtype = DTYPES[number]
    array = sample(dtype, (2, 3))
    head = {
        "v3": struct.pack("<Iiiqq", V3, 0, 2, 2, 3),
        "v2": struct.pack("<Iiiqq", V2, 0, 2, 2, 3),
        "v1": struct.pack("<Iiqq", V1, 2, 2, 3),
        "old": struct.pack("<III", 2, 2, 3),
    }[version]
    data = list_file(head + context(number) + array.tobytes(), names=(b"arg:a",))
    back = read_arrays_from_bytes(data)
    assert_same(back["arg:a"], array)
    if version == "v2":
        assert write_arrays_to_bytes(back) == data
    if version == "v3":
        assert write_arrays_to_bytes(back, np_shape=True) == data


@pytest.mark.parametrize(
    "array",
    [struct.pack("<Iii", V3, 0, -1), struct.pack("<Iiiqq", V3, 0, 2, 4, -1), struct.pack("<Iii", V2, 0, 0)]
    + [struct.pack("<Ii", V1, 0), struct.pack("<I", 0)],
    ids=["v3", "v3-dimension", "v2", "v1", "old"],
)
def test_array_without_a_shape_is_empty(array):
    back = read_arrays_from_bytes(list_file(array, array, names=(b"a", b"b")))
    assert {name: value.shape for name, value in back.items()} == {"a": (0,), "b": (0,)}


def test_not_contiguous_and_big_endian_arrays():
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    expected = write_arrays_to_bytes({"a": base[:, ::2].copy(), "b": base.T.copy()})
    assert write_arrays_to_bytes({"a": base[:, ::2], "b": base.astype(">f4").T}) == expected


def test_bytes_other_than_0_and_1_become_true():
    data = list_file(struct.pack("<Iiiq", V2, 0, 1, 3) + context(7) + b"\0\1\7")
    (array,) = read_arrays_from_bytes(data)
    assert array.dtype == np.bool_
    assert array.tobytes() == b"\0\1\1"


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, 3.4e38, 1e-40], np.float32)
    back = bfloat16_to_float32(float32_to_bfloat16(values))
    assert back[:3].tolist() == [1.0, 1.0, 1.015625]
    assert np.signbit(back[3])
    assert back[4] == back[5] == np.inf
    tricky = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(tricky))).all()


def test_bfloat16_agrees_with_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = sample(np.dtype(np.float32), (1000,))
    values = values[~np.isnan(values)]
    theirs = values.astype(ml_dtypes.bfloat16)
    assert float32_to_bfloat16(values).tobytes() == theirs.tobytes()
    assert write_arrays_to_bytes({"a": theirs}) == write_arrays_to_bytes({"a": theirs.view(BFLOAT16)})


@pytest.mark.parametrize("value", [np.ones(2, complex), np.array(["x"]), np.array([None]), np.zeros(2, "<u2,<u2")])
def test_dtypes_the_format_lacks(value):
    with pytest.raises(ValueError, match="'arg:a' has dtype"):
        write_arrays_to_bytes({"arg:a": value})


def test_scalars_need_np_shape():
    with pytest.raises(ValueError, match="0 dimensions"):
        write_arrays_to_bytes({"a": np.float32(1)})


def test_nul_in_a_name():
    with pytest.raises(ValueError, match="NUL"):
        write_arrays_to_bytes({"a\0b": np.ones(1)})


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.params"
    write_arrays(path, {"a": np.ones(1)})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_arrays(path, {"a": np.zeros(1), "b": np.zeros(1, complex)})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ParamsFileError, match=r"none.params: No such file"):
        read_arrays(tmp_path / "none.params")
    with pytest.raises(ParamsFileError, match="directory"):
        read_arrays(tmp_path)


# ---------------------------------------------------------------------------- hostile files

ONE = struct.pack("<Iiiq", V2, 0, 1, 1) + context(0) + struct.pack("<f", 1.0)
HOSTILE = {
    "empty": (b"", "ends inside the file header"),
    "not a list": (b"PK\3\4" + bytes(60), "begins with 0x4034b50"),
    "billions of arrays": (list_file(ONE, count=2**40), "claims 1099511627776 arrays"),
    "one array too many": (list_file(ONE, count=2), "ends inside"),
    "unknown version": (list_file(struct.pack("<Iii", 0xF993FACB, 0, 1) + bytes(64)), "number 0xf993facb"),
    "row sparse": (list_file(struct.pack("<Ii", V2, 1) + bytes(64)), "row_sparse"),
    "csr": (list_file(struct.pack("<Ii", V2, 2) + bytes(64)), "csr"),
    "unknown storage": (list_file(struct.pack("<Ii", V2, -1) + bytes(64)), "storage type -1"),
    "negative ndim": (list_file(struct.pack("<Iii", V2, 0, -1) + bytes(64)), "claims -1 dimensions"),
    "billions of dimensions": (list_file(struct.pack("<Iii", V2, 0, 2**31 - 1)), "2147483647 dim"),
    "dimensions beyond the file": (list_file(struct.pack("<Iiiq", V2, 0, 32, 1)), "ends inside array 1"),
    "negative shape": (list_file(struct.pack("<Iiiqq", V2, 0, 2, -4, -4) + context(0) + bytes(64)), "shape"),
    "data beyond the file": (list_file(struct.pack("<Iiiq", V2, 0, 1, 2**40) + context(0)), "needs 43980465"),
    "product wraps to 0": (
        list_file(struct.pack("<Iiiqq", V2, 0, 2, 2**32, 2**32) + context(0) + bytes(64)),
        "needs 73786976294838206464 bytes",
    ),
    "zero times huge": (
        list_file(struct.pack("<Iii4q", V2, 0, 4, 0, *[2**62] * 3) + context(0) + bytes(64)),
        "impossible shape",
    ),
    "unknown dtype": (list_file(struct.pack("<Iiiq", V2, 0, 1, 1) + context(13) + bytes(64)), "number 13"),
    "unknown device": (list_file(struct.pack("<Iiiq", V2, 0, 1, 1) + context(0, device=9)), "type 9"),
    "names without arrays": (list_file(names=(b"a",)), "1 names for 0 arrays"),
    "fewer names than arrays": (list_file(ONE, ONE, names=(b"a",)), "1 names for 2 arrays"),
    "name beyond the file": (list_file(ONE, names=(b"abc",))[:-1], "ends inside name 1"),
    "name of 2^64 - 1": (list_file(ONE) [:-8] + struct.pack("<QQ", 1, 2**64 - 1), "ends inside name 1"),
    "name not UTF-8": (list_file(ONE, names=(b"\xff",)), "not UTF-8"),
    "name twice": (list_file(ONE, ONE, names=(b"a", b"a")), "'a' occurs twice"),
    "bytes after the end": (list_file(ONE, names=(b"a",)) + b"\0", "1 bytes follow"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_by_name_and_cause(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.params"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ParamsFileError, match=message) as caught:
            read_arrays(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "hostile.params" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak < 500_000


def test_every_truncation_is_refused():
    data = write_arrays_to_bytes({"arg:a": np.ones((2, 2), np.float32), "aux:b": np.ones((3,), np.float64)})
    for length in range(len(data)):
        with pytest.raises(ParamsFileError):
            read_arrays_from_bytes(data[:length])


def fuzz_seeds() -> list[bytes]:
    floats = np.arange(6, dtype="<f4").tobytes()
    old = [
        struct.pack("<Iiqq", V1, 2, 2, 3) + context(0) + floats,
        struct.pack("<III", 2, 2, 3) + context(0) + floats,
        struct.pack("<Iii", V2, 0, 0),
    ]
    named = {f"arg:{n}": sample(dtype, (2, 1)) for n, dtype in DTYPES.items()}
    return [
        write_arrays_to_bytes({"arg:w": np.ones((2, 3), np.float32), "aux:m": np.ones((3,), np.float32)}),
        write_arrays_to_bytes([np.ones((2,), np.float32), np.ones((0, 2), np.uint8)]),
        write_arrays_to_bytes({"s": np.float32(1), "z": np.ones((0, 3), np.int64)}, np_shape=True),
        write_arrays_to_bytes(named),
        list_file(*old, names=(b"a", b"b", b"c")),
    ]


EDGES = [
    0,
    1,
    2,
    4,
    0xFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**32,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
EDGES += [V1, V2, V3, 0x112, 33, 10**9]


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One to three random damages: bits, numbers at the edge, cuts, repeats and pieces of another file."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind in (2, 3):
            width = 4 if kind == 2 else 8
            at -= at % 4  # fields lie on multiples of four until the first name
            data[at : at + width] = (rng.choice(EDGES) % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 4:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 5:
            data[at:at] = data[at : at + rng.randint(1, 60)]
        else:
            other = rng.choice(seeds)
            data = data[:at] + other[rng.randrange(len(other)) :]
    return bytes(data)


def test_fuzz_20000_mutated_files():
    rng = random.Random(20240229)
    seeds = fuzz_seeds()
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(20_000):
            data = mutate(rng, seeds)
            try:
                arrays = read_arrays_from_bytes(data)
            except ParamsFileError:
                refused += 1
                continue
            values = arrays.values() if isinstance(arrays, dict) else arrays
            assert sum(value.nbytes for value in values) <= len(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The mutations must reach both sides of the reader, and no claim may have been believed.
    assert 10_000 < refused < 19_900
    assert peak < 2_000_000
