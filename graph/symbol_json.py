"""MXNet's Symbol JSON, versions 0.8 to 1.9.1, read into a small immutable graph without MXNet.

    graph = load("model-symbol.json")
    graph.arguments, graph.auxiliary        # names, as list_arguments() and list_auxiliary_states() order them
    for node in graph.nodes: ...            # inputs always come before their consumers

What differs between versions is settled here, so that nobody else has to know it: where the attributes lie (`param`
and `attr` before 0.11, `attrs` since), hidden keys without underscores (`lr_mult` became `__lr_mult__`), entries of
two elements, and auxiliary inputs that files before 0.9 leave out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from errors import UsageError

# Inputs that an op mutates: position -> name of the variable that MXNet adds when the file lacks it.
AUXILIARY_INPUTS = {
    "BatchNorm": {3: "moving_mean", 4: "moving_var"},
    "_contrib_SyncBatchNorm": {3: "moving_mean", 4: "moving_var"},
}
# Attributes for the framework instead of the op; old files write them bare, or after an input's name and "_".
HIDDEN_KEYS = ("ctx_group", "lr_mult", "wd_mult", "force_mirroring", "mirror_stage")

REQUIRED = object()


class GraphError(UsageError):
    """A graph that is malformed, or that asks for what is not supported; the message names the node."""


@dataclass(frozen=True)
class Entry:
    """One output of a node, as an input of another."""

    node: int
    output: int = 0


@dataclass(frozen=True)
class Node:
    """A variable (op "null") or an operation; attributes are text, as in the file."""

    op: str
    name: str
    attributes: Mapping[str, str]
    inputs: tuple[Entry, ...]

    @property
    def is_variable(self) -> bool:
        return self.op == "null"

    def hidden(self, key: str) -> str | None:
        """A framework attribute, for example "lr_mult" for `__lr_mult__`."""
        return self.attributes.get(f"__{key}__")


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order and the entries that are the graph's outputs."""

    nodes: tuple[Node, ...]
    heads: tuple[Entry, ...]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Indices of the nodes that the heads need, depth first, inputs first: the order of MXNet's lists."""
        done: dict[int, None] = {}
        stack = [(head.node, False) for head in reversed(self.heads)]
        while stack:
            index, expanded = stack.pop()
            if index in done:
                continue
            if expanded:
                done[index] = None
                continue
            stack.append((index, True))
            stack.extend((entry.node, False) for entry in reversed(self.nodes[index].inputs))
        return tuple(done)

    @cached_property
    def _mutated(self) -> frozenset[int]:
        return frozenset(
            node.inputs[position].node
            for node in self.nodes
            for position in AUXILIARY_INPUTS.get(node.op, ())
            if position < len(node.inputs)
        )

    def _variables(self, mutated: bool) -> tuple[str, ...]:
        chosen = (i for i in self.order if self.nodes[i].is_variable and (i in self._mutated) == mutated)
        return tuple(self.nodes[index].name for index in chosen)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of inputs and parameters in list_arguments() order."""
        return self._variables(mutated=False)

    @cached_property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of auxiliary states in list_auxiliary_states() order."""
        return self._variables(mutated=True)

    def variable(self, name: str) -> Node:
        """The variable called `name`; KeyError when there is none."""
        for node in self.nodes:
            if node.is_variable and node.name == name:
                return node
        raise KeyError(name)


class Attributes:
    """Typed reads of a node's attributes; what is never read is refused by `finish`.

    Defaults are part of MXNet's format, since files leave them out: every read states MXNet's default, or REQUIRED.
    """

    def __init__(self, node: Node):
        self.node = node
        self._unread = {key for key in node.attributes if not (key.startswith("__") and key.endswith("__"))}

    def error(self, problem: str) -> GraphError:
        return GraphError(f"node {self.node.name!r} ({self.node.op}): {problem}")

    def text(self, key: str, default=REQUIRED):
        self._unread.discard(key)
        value = self.node.attributes.get(key)
        if value is None and default is REQUIRED:
            raise self.error(f"attribute {key!r} is missing")
        return default if value is None else value

    def _read(self, key: str, default, parse, kind: str):
        value = self.text(key, default)
        if not isinstance(value, str):
            return value
        try:
            return parse(value.strip(), default)
        except ValueError:
            raise self.error(f"attribute {key!r} is {value!r}, expected {kind}") from None

    def integer(self, key: str, default=REQUIRED):
        return self._read(key, default, _parse_integer, "an integer")

    def number(self, key: str, default=REQUIRED):
        return self._read(key, default, _parse_number, "a number")

    def boolean(self, key: str, default=REQUIRED):
        return self._read(key, default, _parse_boolean, "True or False")

    def integers(self, key: str, default=REQUIRED):
        """A tuple of integers; elements may be None; "()" and "None" stand for the default."""
        return self._read(key, default, _parse_integers, "a tuple of integers")

    def choice(self, key: str, choices: tuple[str, ...], default=REQUIRED):
        """One of `choices`; anything else is refused."""
        value = self.text(key, default)
        if value not in choices:
            raise self.error(f"{key}={value} is not supported (only {', '.join(map(str, choices))})")
        return value

    def ignore(self, *keys: str) -> None:
        """Attributes that change speed or memory, never the result."""
        self._unread.difference_update(keys)

    def finish(self) -> None:
        """Raise when the node has an attribute that nothing has read."""
        if self._unread:
            raise self.error(f"attribute {', '.join(sorted(self._unread))} is not supported")


def _parse_integer(text: str, default):
    if text == "None" and default is not REQUIRED:
        return default
    return int(text[:-1] if text.endswith("L") else text)


def _parse_number(text: str, default):
    if text == "None" and default is not REQUIRED:
        return default
    return float(text)


def _parse_boolean(text: str, default) -> bool:
    table = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in table:
        raise ValueError(text)
    return table[text.lower()]


def _parse_integers(text: str, default):
    if text == "None":
        text = "()"
    if text[:1] in "([" and text[-1:] in ")]":
        text = text[1:-1]
    parts = [part.strip() for part in text.split(",")]
    if parts and not parts[-1]:
        parts.pop()
    if not parts:
        if default is REQUIRED:
            raise ValueError(text)
        return default
    return tuple(None if part == "None" else _parse_integer(part, REQUIRED) for part in parts)


def load(path: str | Path) -> Graph:
    """Read a `-symbol.json` file; GraphError when it is missing or malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"cannot read the graph {path}: {error}") from None
    try:
        return parse(text)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from None


def parse(text: str) -> Graph:
    """The graph that a Symbol JSON text holds; GraphError names what is wrong and where."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"not a Symbol JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("nodes"), list):
        raise GraphError("not a Symbol JSON: it has no list of nodes")
    builder = _Builder()
    for index, raw in enumerate(content["nodes"]):
        builder.add(index, raw)
    heads = content.get("heads")
    if not isinstance(heads, list) or not heads:
        raise GraphError("not a Symbol JSON: it has no heads")
    return builder.finish([builder.entry(head, "heads") for head in heads])


@dataclass
class _Draft:
    """A node while its attributes may still change: an old file's op can hold those of its inputs."""

    op: str
    name: str
    attributes: dict[str, str]
    inputs: tuple[Entry, ...] = ()


@dataclass
class _Builder:
    """Nodes in new positions, since missing auxiliary variables are inserted before the op that needs them."""

    drafts: list[_Draft] = field(default_factory=list)
    position: list[int] = field(default_factory=list)  # index in the file -> index in `drafts`
    variables: dict[str, int] = field(default_factory=dict)

    def add(self, index: int, raw: object) -> None:
        if not isinstance(raw, dict):
            raise GraphError(f"node {index} is not an object")
        name = raw.get("name")
        where = f"node {index} ({name!r})"
        if not isinstance(name, str) or not isinstance(raw.get("op"), str):
            raise GraphError(f"{where} lacks its name or its op")
        inputs = raw.get("inputs", [])
        if not isinstance(inputs, list):
            raise GraphError(f"{where}: its inputs are not a list")
        draft = _Draft(raw["op"], name, _attributes(raw, where))
        draft.inputs = tuple(self.entry(item, where) for item in inputs)
        if draft.op == "null" and draft.inputs:
            raise GraphError(f"{where} is a variable with inputs")
        self._move_input_attributes(draft)
        self._add_missing_auxiliary(draft)
        self._append(draft)
        self.position.append(len(self.drafts) - 1)

    def entry(self, item: object, where: str) -> Entry:
        """[node, output] or [node, output, version], pointing backwards."""
        whole = isinstance(item, list) and 2 <= len(item) <= 3
        if not whole or not all(isinstance(number, int) and number >= 0 for number in item):
            raise GraphError(f"{where}: {item!r} is not an input [node, output]")
        if item[0] >= len(self.position):
            raise GraphError(f"{where}: input {item!r} points to a node that does not come before it")
        return Entry(self.position[item[0]], item[1])

    def finish(self, heads: list[Entry]) -> Graph:
        nodes = tuple(
            Node(draft.op, draft.name, MappingProxyType(draft.attributes), draft.inputs) for draft in self.drafts
        )
        return Graph(nodes, tuple(heads))

    def _append(self, draft: _Draft) -> None:
        if draft.op == "null":
            if draft.name in self.variables:
                raise GraphError(f"two variables are called {draft.name!r}")
            self.variables[draft.name] = len(self.drafts)
        self.drafts.append(draft)

    def _move_input_attributes(self, draft: _Draft) -> None:
        """`weight_lr_mult` of an op is `__lr_mult__` of its input `..._weight`."""
        for key in [key for key in draft.attributes if key.endswith(tuple(f"_{hidden}" for hidden in HIDDEN_KEYS))]:
            hidden = next(hidden for hidden in HIDDEN_KEYS if key.endswith(f"_{hidden}"))
            role = key[: -len(hidden) - 1]
            for entry in draft.inputs:
                target = self.drafts[entry.node]
                if target.op == "null" and target.name.endswith(role):
                    target.attributes[f"__{hidden}__"] = draft.attributes.pop(key)
                    break

    def _add_missing_auxiliary(self, draft: _Draft) -> None:
        for position, role in AUXILIARY_INPUTS.get(draft.op, {}).items():
            if position == len(draft.inputs):
                self._append(_Draft("null", f"{draft.name}_{role}", {}))
                draft.inputs += (Entry(len(self.drafts) - 1),)


def _attributes(raw: dict, where: str) -> dict[str, str]:
    """All attributes of a node under today's keys."""
    merged: dict[str, str] = {}
    for place in ("param", "attr", "attrs"):
        values = raw.get(place) or {}
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise GraphError(f"{where}: {place!r} is not a mapping of texts")
        for key, value in values.items():
            merged[f"__{key}__" if key in HIDDEN_KEYS else key] = value
    return merged
