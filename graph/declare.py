"""Declare a Symbol graph without MXNet: the operators that `symbols.layers` calls, and MXNet's own JSON out of them.

    data = Variable("data")
    body = operators.Convolution(data, name="conv0", num_filter=8, kernel=(3, 3), no_bias=True)
    body.list_arguments()       # ["data", "conv0_weight"]
    body.tojson()               # byte for byte what MXNet 1.9.1 writes for the same calls

An operator is a row of OPERATORS. Attributes are kept as the text that Python's `str` makes of them, as MXNet keeps
them, and are not checked: that they are right is what the tests compare with MXNet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from graph.symbol_json import AUXILIARY_INPUTS, Attributes, Entry, Graph, GraphError, Node

MXNET_VERSION = 10901
# Longer lists of numbers are written one to a line.
LONGEST_LINE = 10


@dataclass(frozen=True)
class Operator:
    """inputs: names of the inputs; one that is not given becomes a variable NAME_input, unless `absent` holds its
    name and the (attribute, default, value) that does without it. outputs: how many, hidden ones included; they may
    depend on the attributes. variadic: any number of inputs, counted by the attribute num_args. initial: `__init__`
    of a variable so made.
    """

    inputs: tuple[str, ...] = ("data",)
    outputs: int | Callable[[Mapping[str, str]], int] = 1
    absent: Mapping[str, tuple[str, bool, bool]] = field(default_factory=dict)
    variadic: bool = False
    initial: Mapping[str, str] = field(default_factory=dict)

    def count_outputs(self, attributes: Mapping[str, str]) -> int:
        return self.outputs if isinstance(self.outputs, int) else self.outputs(attributes)


def _pooling_outputs(attributes: Mapping[str, str]) -> int:
    """oneDNN keeps a maximum's position for the backward pass."""
    return 2 if attributes.get("pool_type", "max") == "max" else 1


BIAS = {"bias": ("no_bias", False, True)}
MOVING = {"moving_mean": '["zero", {}]', "moving_var": '["one", {}]'}
PAIR = ("lhs", "rhs")

OPERATORS = {
    "Activation": Operator(),
    "BatchNorm": Operator(("data", "gamma", "beta", "moving_mean", "moving_var"), outputs=3, initial=MOVING),
    "Concat": Operator(variadic=True),
    "Convolution": Operator(("data", "weight", "bias"), absent=BIAS),
    "Dropout": Operator(outputs=2),
    "Flatten": Operator(),
    "FullyConnected": Operator(("data", "weight", "bias"), absent=BIAS),
    "Pooling": Operator(outputs=_pooling_outputs),
    "Reshape": Operator(),
    "SoftmaxOutput": Operator(("data", "label")),
    "_mul_scalar": Operator(),
    "batch_dot": Operator(PAIR),
    "broadcast_mul": Operator(PAIR),
    "elemwise_add": Operator(PAIR),
    "mean": Operator(),
}


@dataclass(frozen=True, eq=False)
class _Declared:
    """A node and the nodes whose (first) outputs it reads."""

    op: str
    name: str
    attributes: Mapping[str, str]
    inputs: tuple[_Declared, ...] = ()


@dataclass(frozen=True, eq=False)
class Symbol:
    """The first output of a declared node, with the few methods of `mx.sym.Symbol` that a declaration needs."""

    _node: _Declared

    @property
    def name(self) -> str:
        return self._node.name

    def graph(self) -> Graph:
        """All nodes that this output needs, in MXNet's order: depth first, inputs before their consumers."""
        position: dict[_Declared, int] = {}
        stack = [(self._node, False)]
        while stack:
            node, expanded = stack.pop()
            if node in position:
                continue
            if expanded:
                position[node] = len(position)
                continue
            stack.append((node, True))
            stack.extend((source, False) for source in reversed(node.inputs))
        nodes = tuple(
            Node(node.op, node.name, MappingProxyType(node.attributes), tuple(Entry(position[n]) for n in node.inputs))
            for node in position
        )
        return Graph(nodes, (Entry(position[self._node]),))

    def tojson(self) -> str:
        """The graph as MXNet's Symbol JSON."""
        return write(self.graph())

    def list_arguments(self) -> list[str]:
        """Names of inputs and parameters, in MXNet's order."""
        return list(self.graph().arguments)

    def list_auxiliary_states(self) -> list[str]:
        """Names of moving statistics, in MXNet's order."""
        return list(self.graph().auxiliary)


class _Operators:
    """The namespace that stands for `mx.sym`: `operators.Convolution(data, name=..., **attributes)`."""

    def __getattr__(self, op: str) -> Callable[..., Symbol]:
        if op not in OPERATORS:
            raise AttributeError(f"graph.declare.OPERATORS has no row for {op!r}")
        return partial(_apply, op)

    @property
    def _internal(self) -> _Operators:
        """MXNet keeps operators with an underscore here."""
        return self

    Variable = staticmethod(lambda name: Symbol(_Declared("null", name, {})))


operators = _Operators()
Variable = operators.Variable


def _apply(op: str, *inputs: Symbol, name: str, **attributes: object) -> Symbol:
    """A new node; inputs are given by position, or by name among the attributes."""
    row = OPERATORS[op]
    named = {key: value for key, value in attributes.items() if isinstance(value, Symbol)}
    texts = {key: str(value) for key, value in attributes.items() if key not in named}
    if row.variadic:
        texts.setdefault("num_args", str(len(inputs)))
        sources = inputs
    else:
        given = {**dict(zip(row.inputs, inputs)), **named}
        if len(inputs) > len(row.inputs) or not given.keys() <= set(row.inputs):
            raise GraphError(f"node {name!r} ({op}) takes the inputs {', '.join(row.inputs)}")
        sources = [given.get(role) or _implied(role, row, name, texts) for role in _roles(row, op, name, texts)]
    return Symbol(_Declared(op, name, texts, tuple(source._node for source in sources)))


def _roles(row: Operator, op: str, name: str, texts: dict[str, str]) -> list[str]:
    """Names of the inputs that the node has under its attributes."""
    read = Attributes(Node(op, name, texts, ()))
    rules = row.absent
    return [r for r in row.inputs if r not in rules or read.boolean(*rules[r][:2]) != rules[r][2]]


def _implied(role: str, row: Operator, name: str, texts: dict[str, str]) -> Symbol:
    """The variable that MXNet makes for an input that was left out; it carries the attributes of its operator."""
    initial = {"__init__": row.initial[role]} if role in row.initial else {}
    return Symbol(_Declared("null", f"{name}_{role}", {**texts, **initial}))


# ---------------------------------------------------------------------------------------------------------------
# Writing, with the line breaks of MXNet's writer, so that the file is the same whoever declared the graph


def write(graph: Graph) -> str:
    """Symbol JSON of a graph whose operators are all in OPERATORS."""
    variables = [index for index, node in enumerate(graph.nodes) if node.is_variable]
    ends = [0]
    for node in graph.nodes:
        ends.append(ends[-1] + (1 if node.is_variable else OPERATORS[node.op].count_outputs(node.attributes)))
    content = {
        "nodes": _block("[]", [_node_text(node) for node in graph.nodes], 2),
        "arg_nodes": _numbers(variables, 2),
        "node_row_ptr": _numbers(ends, 2),
        "heads": _entries([(head, 0) for head in graph.heads], 2),
        "attrs": f'{{"mxnet_version": ["int", {MXNET_VERSION}]}}',
    }
    return _block("{}", [f'"{key}": {text}' for key, text in content.items()], 0)


def _node_text(node: Node) -> str:
    fields = {"op": _quoted(node.op), "name": _quoted(node.name)}
    if node.attributes:
        pairs = [f"{_quoted(key)}: {_quoted(value)}" for key, value in sorted(node.attributes.items())]
        fields["attrs"] = _block("{}", pairs, 6) if len(pairs) > 1 else f"{{{pairs[0]}}}"
    # The version of an entry tells states that their operator changes from other inputs.
    changed = AUXILIARY_INPUTS.get(node.op, ())
    fields["inputs"] = _entries([(entry, int(i in changed)) for i, entry in enumerate(node.inputs)], 6)
    return _block("{}", [f'"{key}": {text}' for key, text in fields.items()], 4)


def _entries(entries: list[tuple[Entry, int]], indent: int) -> str:
    return _list([f"[{entry.node}, {entry.output}, {version}]" for entry, version in entries], indent)


def _numbers(values: list[int], indent: int) -> str:
    return _list([str(value) for value in values], indent)


def _list(texts: list[str], indent: int) -> str:
    return _block("[]", texts, indent) if len(texts) > LONGEST_LINE else f"[{', '.join(texts)}]"


def _block(brackets: str, lines: list[str], indent: int) -> str:
    """One item to a line, two columns further in."""
    inside = ", \n".join(" " * (indent + 2) + line for line in lines)
    return f"{brackets[0]}\n{inside}\n{' ' * indent}{brackets[1]}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
