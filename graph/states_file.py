"""Optimizer states as MXNet's Module pickles them (`Module.save_optimizer_states`), read without unpickling.

    states = read_module_states("model-0050.states", ["conv0_weight", "conv0_bias", ...])
    states.optimizer     # {"momentum:conv0_weight": float32 (64, 3, 7, 7), ...}

A pickle is a program, and Python's unpickler runs it. Here a small machine follows the few instructions that such
files consist of: it knows numbers, strings, containers and the bytes of arrays, calls nothing and refuses any other
instruction or name, so the worst that a file can do is to be refused. pickletools, which takes the instructions
apart, executes nothing either.

The pickle is `{key: state}`, or `(that, optimizer)` when it was written with `dump_optimizer=True`. Keys are
parameter names where the optimizer runs in the kvstore, else `i * devices + k`, i being the parameter's number. States
are an array (momentum of sgd and nag), a pair (mean and variance of adam) or None (sgd without momentum).
"""

from __future__ import annotations

import io
import os
import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UsageError
from graph.params_file import ParamsFileError, read_array_from_bytes

NDARRAY_MODULES = ("mxnet.ndarray.ndarray", "mxnet.ndarray")
# An optimizer that was pickled along is read as a record of its attributes; none of its code is needed.
RECORD_MODULES = re.compile(r"mxnet\.(optimizer|lr_scheduler)(\.\w+)*")
PAIR_SLOTS = ("mean", "variance")


class StatesFileError(UsageError):
    """A `.states` file that is damaged, or a pickle of something else than optimizer states."""


@dataclass
class ModuleStates:
    """What a Module's states file holds.

    optimizer: "SLOT:NAME" -> array, SLOT being "momentum", or "mean" and "variance", as in engines.base.TrainState;
    empty for sgd without momentum. updates: number of updates done, None where the file does not say (it does only
    when the optimizer was dumped too).
    """

    optimizer: dict[str, np.ndarray]
    updates: int | None


def read_module_states(path: str | os.PathLike[str], names: Sequence[str] | None = None) -> ModuleStates:
    """Read a pickled `.states` file of a Module.

    names: the parameters' names in the Module's order (list_arguments without data and labels); needed where the
    keys are numbers and no optimizer was dumped. Of several devices' copies, which are equal, the first is taken.
    Raises StatesFileError naming the file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StatesFileError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    return read_module_states_from_bytes(data, names, os.fspath(path))


def read_module_states_from_bytes(
    data: bytes, names: Sequence[str] | None = None, name: str = "<bytes>"
) -> ModuleStates:
    """As `read_module_states`, from the content of a file; `name` is what error messages call it."""
    try:
        states, attributes = _split(_Machine(data).run())
        return ModuleStates(_by_name(states, attributes, names), _count(attributes.get("num_update")))
    except (StatesFileError, ParamsFileError) as error:
        raise StatesFileError(f"{name}: {error}") from error


class _Global(NamedTuple):
    """A class or function that a pickle mentions; never looked up."""

    module: str
    name: str


@dataclass
class _Record:
    """An object of the pickle: its class's name and its attributes; `array` for an NDArray with data."""

    kind: _Global
    attributes: dict = field(default_factory=dict)
    array: np.ndarray | None = None


class _Mark:
    """Where on the stack the items of a container begin."""


class _Machine:
    """Follows a pickle's instructions over a stack of plain values; protocols 2 to 5."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list = []
        self.memo: dict[int, object] = {}
        # Arrays cannot hold more bytes than the file; a pickle that reuses one array's bytes over and over could.
        self.budget = len(data)

    def run(self) -> object:
        """The pickled value."""
        try:
            for opcode, argument, _position in pickletools.genops(io.BytesIO(self.data)):
                if opcode.name == "STOP":
                    (value,) = self.stack
                    return value
                self._step(opcode.name, argument)
        except (StatesFileError, ParamsFileError):
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise StatesFileError("not a pickle, truncated or damaged") from error
        raise StatesFileError("not a pickle, truncated or damaged")

    def _step(self, name: str, argument: object) -> None:
        if name in _PLAIN:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise StatesFileError(f"refused: the pickle uses {name}, which no optimizer state needs")

    def _pop(self, count: int) -> list:
        if count > len(self.stack):
            raise IndexError
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _pop_to_mark(self) -> list:
        mark = len(self.stack) - 1
        while mark >= 0 and self.stack[mark] is not _Mark:
            mark -= 1
        if mark < 0:
            raise IndexError
        items = self.stack[mark + 1 :]
        del self.stack[mark:]
        return items

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple(self._pop(count)))

    def _tuple_to_mark(self) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        keys = items[0::2]
        if type(target) is not dict or len(items) % 2 or not all(type(key) in (str, int) for key in keys):
            raise TypeError
        target.update(zip(keys, items[1::2]))

    def _global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        known = (
            (module in NDARRAY_MODULES and name == "NDArray")
            or (module in ("builtins", "__builtin__") and name == "bytearray")
            or (RECORD_MODULES.fullmatch(module) and name.isidentifier())
        )
        if not known:
            raise StatesFileError(f"refused: the pickle asks for {module}.{name}; it could run anything")
        self.stack.append(_Global(module, name))

    def _call(self) -> None:
        """REDUCE, NEWOBJ: nothing is called; NDArray and optimizers become records, bytearray its bytes."""
        function, arguments = self._pop(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError
        if function.name != "bytearray":
            self.stack.append(_Record(function))
        elif len(arguments) == 1 and isinstance(arguments[0], bytes):
            self.stack.append(arguments[0])
        elif not arguments:
            self.stack.append(b"")
        else:
            raise StatesFileError("refused: bytearray of something else than bytes")

    def _build(self) -> None:
        target, attributes = self._pop(2)
        if not isinstance(target, _Record) or not isinstance(attributes, dict):
            raise TypeError
        self.stack.append(target)
        target.attributes = attributes
        if target.kind.name == "NDArray" and attributes.get("handle") is not None:
            raw = attributes["handle"]
            self.budget -= len(raw)
            if self.budget < 0:
                raise StatesFileError("refused: the arrays hold more bytes than the file")
            target.array = read_array_from_bytes(bytes(raw), "an array of the pickle")


# What an instruction's argument already is: numbers, strings and bytes.
_PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_PLAIN |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _Mark}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_STEPS = {
    "TUPLE": lambda machine, _: machine._tuple_to_mark(),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append(machine._pop(1)),
    "APPENDS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine._global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine._global(*machine._pop(2)),
    "REDUCE": lambda machine, _: machine._call(),
    "NEWOBJ": lambda machine, _: machine._call(),
    "BUILD": lambda machine, _: machine._build(),
}


def _split(value: object) -> tuple[dict, dict]:
    """States by key, and the dumped optimizer's attributes (empty where there is none)."""
    attributes: dict = {}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Record):
        value, attributes = value[0], value[1].attributes
    if not isinstance(value, dict):
        raise StatesFileError("a pickle, but not of optimizer states")
    return value, attributes


def _by_name(states: dict, attributes: dict, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """The arrays of all states as "SLOT:NAME", in the order of the keys."""
    found: dict[str, np.ndarray] = {}
    key_names = _key_names(states, attributes, names)
    for key, state in states.items():
        if key_names[key] is None:
            continue  # another device's copy
        for slot, array in _slots(key_names[key], state):
            found[f"{slot}:{key_names[key]}"] = array
    return found


def _key_names(states: dict, attributes: dict, names: Sequence[str] | None) -> dict:
    """The parameter's name for each key, None for copies on further devices."""
    texts = [key for key in states if isinstance(key, str)]
    numbers = [key for key in states if not isinstance(key, str)]
    if texts and numbers:
        raise StatesFileError("the keys are names and numbers mixed")
    if texts:
        strangers = sorted(set(texts) - set(names)) if names is not None else []
        if strangers:
            raise StatesFileError(f"states of parameters that the network lacks: {', '.join(strangers)}")
        return {key: key for key in texts}
    if not numbers:
        return {}
    dumped = attributes.get("idx2name")
    if isinstance(dumped, dict) and all(isinstance(dumped.get(key), str) for key in numbers):
        first = {dumped[key]: key for key in sorted(numbers, reverse=True)}
        return {key: dumped[key] if first[dumped[key]] == key else None for key in numbers}
    if not names:
        raise StatesFileError("the keys are numbers, and the parameters' names are not known")
    devices, rest = divmod(max(numbers) + 1, len(names))
    if rest or min(numbers) < 0:
        raise StatesFileError(f"{max(numbers) + 1} states do not fit {len(names)} parameters on any number of devices")
    return {key: names[key // devices] if key % devices == 0 else None for key in numbers}


def _slots(name: str, state: object) -> list[tuple[str, np.ndarray]]:
    """Slot and array of one parameter's state."""
    if state is None:
        return []
    if isinstance(state, tuple) and len(state) == 2:
        mean, variance = (_array(name, part) for part in state)
        if mean.shape != variance.shape or (variance < 0).any():
            raise StatesFileError(f"the state of {name} is a pair, but not mean and variance (mixed precision?)")
        return list(zip(PAIR_SLOTS, (mean, variance)))
    return [("momentum", _array(name, state))]


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, _Record) or value.array is None or value.array.dtype.kind != "f":
        raise StatesFileError(f"the state of {name} is not an array of floating point numbers")
    return value.array


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
