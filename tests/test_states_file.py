"""Pickled optimizer states of MXNet's Module are read; nothing in them is executed."""

from __future__ import annotations

import collections
import os
import pickle
import random
import struct
import sys
import tracemalloc
import types

import numpy as np
import pytest

from graph.params_file import write_arrays_to_bytes
from graph.states_file import StatesFileError, read_module_states, read_module_states_from_bytes

NAMES = ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]


class NDArray:
    """Pickles as MXNet's NDArray does: a call with None, then the bytes of one array as state."""

    def __init__(self, values: object) -> None:
        data = write_arrays_to_bytes([np.asarray(values, np.float32)])
        self.handle = bytearray(data[24:-8])  # without the list around it

    def __reduce__(self) -> tuple:
        return NDArray, (None,), {"handle": self.handle}


@pytest.fixture
def mxnet_names(monkeypatch):
    """Lets the class above pickle under the name of MXNet's; MXNet itself is not needed."""
    module = types.ModuleType("mxnet.ndarray.ndarray")
    module.NDArray = NDArray
    monkeypatch.setitem(sys.modules, "mxnet", types.ModuleType("mxnet"))
    monkeypatch.setitem(sys.modules, "mxnet.ndarray", types.ModuleType("mxnet.ndarray"))
    monkeypatch.setitem(sys.modules, "mxnet.ndarray.ndarray", module)
    monkeypatch.setattr(NDArray, "__module__", "mxnet.ndarray.ndarray")


def assert_states(found, expected: dict[str, list]) -> None:
    assert list(found.optimizer) == list(expected)
    for name, values in expected.items():
        assert found.optimizer[name].dtype == np.float32
        assert found.optimizer[name].tolist() == values


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(mxnet_names, protocol):
    data = pickle.dumps({"a": NDArray([1, 2]), "b": NDArray([[3]])}, protocol)
    if protocol == 2:  # bytes are a call of _codecs.encode there; MXNet never wrote such files on Python 3
        with pytest.raises(StatesFileError, match="_codecs.encode"):
            read_module_states_from_bytes(data)
    else:
        assert_states(read_module_states_from_bytes(data), {"momentum:a": [1, 2], "momentum:b": [[3]]})


def test_adam_pairs_and_none(mxnet_names):
    data = pickle.dumps({"a": (NDArray([-1]), NDArray([2])), "b": None})
    assert_states(read_module_states_from_bytes(data), {"mean:a": [-1], "variance:a": [2]})


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_numbered_keys_of_several_devices(mxnet_names, devices):
    states = {i * devices + k: NDArray([i, k]) for i in range(4) for k in range(devices)}
    found = read_module_states_from_bytes(pickle.dumps(states), NAMES)
    assert_states(found, {f"momentum:{name}": [i, 0] for i, name in enumerate(NAMES)})


def test_numbered_keys_need_names(mxnet_names):
    data = pickle.dumps({0: NDArray([1]), 1: NDArray([1])})
    with pytest.raises(StatesFileError, match="names are not known"):
        read_module_states_from_bytes(data)
    with pytest.raises(StatesFileError, match="2 states do not fit 4 parameters"):
        read_module_states_from_bytes(data, NAMES)


def test_names_that_the_network_lacks(mxnet_names):
    with pytest.raises(StatesFileError, match="lacks: other_weight"):
        read_module_states_from_bytes(pickle.dumps({"other_weight": NDArray([1])}), NAMES)


def test_mixed_precision_pairs_are_not_taken_for_adam(mxnet_names):
    with pytest.raises(StatesFileError, match="mixed precision"):
        read_module_states_from_bytes(pickle.dumps({"a": (NDArray([0.1]), NDArray([-0.5]))}))


# ---------------------------------------------------------------------------- against MXNet


@pytest.fixture(scope="module")
def mx():
    return pytest.importorskip("mxnet_compat", exc_type=ImportError).mx


def train_module(mx, name, options, kvstore, devices):
    """A Module of four parameters after two updates."""
    data = mx.sym.var("data")
    net = mx.sym.FullyConnected(data, num_hidden=4, name="fc1")
    net = mx.sym.SoftmaxOutput(mx.sym.FullyConnected(net, num_hidden=3, name="fc2"), name="softmax")
    module = mx.mod.Module(net, context=[mx.cpu(i) for i in range(devices)])
    rng = np.random.default_rng(0)
    batches = mx.io.NDArrayIter(rng.random((8, 5), np.float32), np.arange(8) % 3, batch_size=4)
    module.bind(batches.provide_data, batches.provide_label)
    module.init_params(mx.init.Xavier())
    module.init_optimizer(kvstore=kvstore, optimizer=name, optimizer_params=options)
    for batch in batches:
        module.forward_backward(batch)
        module.update()
    mx.nd.waitall()
    return module


def mxnet_arrays(states, numbered_by=1):
    """What MXNet's own states hold, under our names."""
    found = {}
    for key, state in states.items():
        if not isinstance(key, str):
            if key % numbered_by:
                continue
            key = NAMES[key // numbered_by]
        pairs = zip(("mean", "variance"), state) if isinstance(state, tuple) else [("momentum", state)]
        found.update({f"{slot}:{key}": array.asnumpy() for slot, array in pairs})
    return found


@pytest.mark.parametrize(
    ("optimizer", "options"), [("sgd", {"momentum": 0.9}), ("nag", {"momentum": 0.9}), ("adam", {})]
)
@pytest.mark.parametrize(("kvstore", "devices"), [(None, 1), (None, 2), ("device", 2)])
def test_files_of_mxnet(mx, tmp_path, optimizer, options, kvstore, devices):
    module = train_module(mx, optimizer, options, kvstore, devices)
    path = tmp_path / "module.states"
    module.save_optimizer_states(str(path))
    expected = mxnet_arrays(pickle.loads(path.read_bytes()), devices)
    assert any(array.any() for array in expected.values())
    found = read_module_states(path, NAMES)
    assert list(found.optimizer) == list(expected)
    for name, array in expected.items():
        assert found.optimizer[name].tobytes() == array.tobytes()
        assert found.optimizer[name].shape == array.shape
    assert found.updates is None


def test_sgd_without_momentum_has_no_states(mx, tmp_path):
    module = train_module(mx, "sgd", {}, None, 1)
    module.save_optimizer_states(str(tmp_path / "module.states"))
    assert read_module_states(tmp_path / "module.states", NAMES).optimizer == {}


@pytest.mark.parametrize("scheduler", [False, True])
def test_dumped_optimizer_tells_names_and_updates(mx, scheduler):
    options = {"lr_scheduler": mx.lr_scheduler.MultiFactorScheduler([5, 9])} if scheduler else {}
    module = train_module(mx, "adam", options, None, 2)
    data = module._updater.get_states(dump_optimizer=True)
    expected = mxnet_arrays(module._updater.states, 2)
    found = read_module_states_from_bytes(data)
    assert {name: array.tolist() for name, array in found.optimizer.items()} == {
        name: array.tolist() for name, array in expected.items()
    }
    assert found.updates == 2


# ---------------------------------------------------------------------------- malice


class Call:
    """Pickles as a call of `function`, which an ordinary unpickler would make."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


MALICE = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({marker!r}, 'w')"),
    "open": lambda marker: Call(open, marker, "w"),
    "bytearray of a number": lambda marker: Call(bytearray, 2**40),
    "bytearray of text": lambda marker: Call(bytearray, "a" * 9, "latin-1"),
    "ordered dictionary": lambda marker: collections.OrderedDict(a=1),
    "numpy array": lambda marker: np.ones(3),
    "set": lambda marker: {1, 2},
}


@pytest.mark.parametrize("case", MALICE)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_refused(tmp_path, case, protocol):
    marker = tmp_path / "marker"
    path = tmp_path / "evil.states"
    path.write_bytes(pickle.dumps({"fc1_weight": MALICE[case](str(marker))}, protocol))
    with pytest.raises(StatesFileError, match=r"evil\.states: "):
        read_module_states(path, NAMES)
    assert not marker.exists()


def test_the_marker_would_have_been_made(tmp_path):
    """The test above can fail: Python's own unpickler does what the pickle says."""
    pickle.loads(pickle.dumps(Call(open, str(tmp_path / "marker"), "w"))).close()
    assert (tmp_path / "marker").exists()


def test_names_disguised_as_mxnet_are_refused():
    for module, name in (
        ("mxnet.ndarray.ndarray", "load"),
        ("mxnet.base", "NDArray"),
        ("mxnet.optimizer.os", "system.x"),
        ("mxnet.optimizer/../os", "system"),
        ("builtins", "bytearray.fromhex"),
        ("mxnet.optimizer\n", "SGD"),
    ):
        text = [struct.pack("<BI", ord("X"), len(part.encode())) + part.encode() for part in (module, name)]
        data = b"\x80\x04" + b"".join(text) + b"\x93."
        with pytest.raises(StatesFileError, match="refused: the pickle asks for"):
            read_module_states_from_bytes(data)


HUGE = 2**50
BOMBS = {
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.",
    "string longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.",
    "bytearray longer than the file": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"x.",
    "memo slot in the billions": b"\x80\x04Nr\xff\xff\xff\xff.",
    "frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N.",
    "nothing": b"",
    "no stop": b"\x80\x04}",
    "empty stack": b"\x80\x04.",
    "two values": b"\x80\x04NN.",
    "no mark": b"\x80\x04}u.",
    "pop from nothing": b"\x80\x04\x87.",
    "unknown memo": b"\x80\x04h\x07.",
    "text": b"hello\n",
    "number as key list": b"\x80\x04}]K\x01s.",
    "itself": b"\x80\x04}\x94K\x00h\x00s.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_cheaply(case):
    tracemalloc.start()
    try:
        with pytest.raises(StatesFileError):
            read_module_states_from_bytes(BOMBS[case], NAMES)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_one_array_cannot_be_multiplied(mxnet_names):
    """Many small objects that share one big array's bytes would fill the memory."""
    shared = NDArray(np.ones(1000)).handle
    arrays = {}
    for i in range(100):
        arrays[f"w{i}"] = NDArray([0])
        arrays[f"w{i}"].handle = shared
    with pytest.raises(StatesFileError, match="more bytes than the file"):
        read_module_states_from_bytes(pickle.dumps(arrays, 5))


def test_fuzz(mxnet_names):
    rng = random.Random(3)
    seeds = [
        pickle.dumps({"a": NDArray([1, 2]), "b": (NDArray([3]), NDArray([4]))}, protocol) for protocol in (3, 4, 5)
    ]
    outcomes = collections.Counter()
    for _ in range(4000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[at] = rng.randrange(256)
            else:
                del data[at : at + rng.randint(1, 20)]
        try:
            read_module_states_from_bytes(bytes(data), ["a", "b"])
            outcomes["read"] += 1
        except StatesFileError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 1000
    assert outcomes["read"] > 100
