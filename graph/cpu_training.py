"""The same graph in the operators that MXNet trains fastest on CPUs: `for_cpu_training(symbol.tojson())`.

Arguments, auxiliary states, their order and shapes, outputs and the names of the nodes that stay are the same; only
the arithmetic between them is cut differently, so results differ by rounding. Meant for the binding that trains: what
is written to files, and what inference binds, is the graph as it was declared. The reasons below were measured with
MXNet 1.9.1, whose CPU kernels are those of oneDNN 2.4 and its own; `benchmarks/mxnet_train.py` shows the effect.
"""

from __future__ import annotations

import ast
import json
from typing import Callable, Union

# Channels in a block of oneDNN's layouts on AVX-512. Its fast BatchNorms want this block or the plain layout.
ONEDNN_BLOCK = 16

# (node, output, version), as the JSON of a graph writes an edge.
Entry = tuple


def for_cpu_training(symbol_json: str) -> str:
    """The graph of a Symbol's JSON, as MXNet 1.9.1 writes it, rewritten for training on CPUs; JSON again."""
    graph = json.loads(symbol_json)
    rewriter = _Rewriter(graph["attrs"])
    place: list[int] = []
    for node in graph["nodes"]:
        node.setdefault("attrs", {})
        inputs = [(place[source], *rest) for source, *rest in node["inputs"]]
        rule = RULES.get(node["op"])
        entry = (rule and rule(rewriter, node, inputs)) or rewriter.copy(node, inputs)
        place.append(entry[0])
    return rewriter.json([(place[source], *rest) for source, *rest in graph["heads"]])


class _Rewriter:
    """The nodes of the new graph so far."""

    def __init__(self, attrs: dict) -> None:
        self._attrs = attrs
        self.nodes: list[dict] = []
        self._rows: dict[Entry, tuple[Entry, Entry]] = {}

    def add(self, op: str, name: str, *inputs: Entry, **attrs: object) -> Entry:
        """A new node with one output."""
        return self.copy({"op": op, "name": name, "attrs": {key: str(v) for key, v in attrs.items()}}, list(inputs))

    def copy(self, node: dict, inputs: list[Entry]) -> Entry:
        """A node of the old graph on new inputs."""
        self.nodes.append({**node, "inputs": inputs})
        return (len(self.nodes) - 1, 0, 0)

    def rows(self, data: Entry) -> tuple[Entry, Entry]:
        """A row for every image and channel of `data`, (N * C, H * W), and a row of ones, (1, H * W); made once."""
        if data not in self._rows:
            name = f"{self.nodes[data[0]]['name']}_by_channel{data[1] or ''}"
            rows = self.add("Reshape", f"{name}_rows", data, shape=(-3, -3))
            first = self.add("slice_axis", f"{name}_first", rows, axis=0, begin=0, end=1)
            ones = self.add("ones_like", f"{name}_like", first)
            self._rows[data] = rows, self.add("BlockGrad", f"{name}_ones", ones)
        return self._rows[data]

    def json(self, heads: list[Entry]) -> str:
        variables = [index for index, node in enumerate(self.nodes) if node["op"] == "null"]
        parts = {"nodes": self.nodes, "arg_nodes": variables, "heads": heads, "attrs": self._attrs}
        return json.dumps(parts)


def _means(rewriter: _Rewriter, name: str, data: Entry) -> Entry:
    """Means over the positions, (N * C, 1), as a matrix product."""
    rows, ones = rewriter.rows(data)
    positions = rewriter.add("sum", f"{name}_positions", ones, axis=(1,), keepdims=True)
    weights = rewriter.add("broadcast_div", f"{name}_weights", ones, positions)
    return rewriter.add("dot", f"{name}_dot", rows, weights, transpose_b=True)


def _like_channels(rewriter: _Rewriter, name: str, means: Entry, data: Entry) -> Entry:
    """(N * C, 1) -> (N, C)"""
    return rewriter.add("reshape_like", name, means, data, lhs_begin=0, rhs_begin=0, rhs_end=2)


def _mean(rewriter: _Rewriter, node: dict, inputs: list[Entry]) -> Entry | None:
    """`mean` over the positions: MXNet's own sums one number at a time, in double work."""
    attrs = node["attrs"]
    if _tuple(attrs.get("axis")) != (2, 3) or {"keepdims", "exclude"} & set(attrs):
        return None
    (data,) = inputs
    return _like_channels(rewriter, node["name"], _means(rewriter, node["name"], data), data)


def _global_pooling(rewriter: _Rewriter, node: dict, inputs: list[Entry]) -> Entry | None:
    """Global average Pooling: depending on layouts its backward pass is a reference kernel, a hundred times slower,
    and leaves a gradient in a layout that makes the BatchNorm before it slow as well.
    """
    attrs = node["attrs"]
    if not _true(attrs.get("global_pool")) or attrs.get("pool_type") != "avg" or len(_tuple(attrs["kernel"])) != 2:
        return None
    (data,) = inputs
    means = _means(rewriter, node["name"], data)
    means = _like_channels(rewriter, f"{node['name']}_channels", means, data)
    return rewriter.add("Reshape", node["name"], means, shape=(0, 0, 1, 1))


def _scale_channels(rewriter: _Rewriter, node: dict, inputs: list[Entry]) -> Entry | None:
    """`broadcast_mul` by (N, C, 1, 1): its backward pass sums as slowly as `mean`, twice. The outer product with ones
    spreads the scale instead, so that the sum becomes a matrix product.
    """
    data, scale = inputs
    columns = rewriter.nodes[scale[0]]
    if columns["op"] != "Reshape" or _tuple(columns["attrs"].get("shape"))[-2:] != (1, 1):
        return None
    name = node["name"]
    rows, ones = rewriter.rows(data)
    column = rewriter.add("Reshape", f"{name}_column", scale, shape=(-1, 1))
    spread = rewriter.add("dot", f"{name}_spread", column, ones)
    product = rewriter.add("elemwise_mul", f"{name}_product", rows, spread)
    return rewriter.add("reshape_like", name, product, data)


def _narrow_groups(rewriter: _Rewriter, node: dict, inputs: list[Entry]) -> Entry | None:
    """A convolution with few channels a group works in blocks of 4 or 8 channels, for which, or for the mixture with
    blocks of 16, the BatchNorms on both sides have a reference kernel only, fifty times slower. A change of shape and
    back makes MXNet hand over plain arrays, before the convolution in the gradients too.
    """
    groups = int(node["attrs"].get("num_group", "1"))
    if groups == 1 or not 1 < int(node["attrs"]["num_filter"]) // groups < ONEDNN_BLOCK:
        return None
    name = node["name"]
    data = rewriter.add("expand_dims", f"{name}_expand", inputs[0], axis=0)
    data = rewriter.add("squeeze", f"{name}_squeeze", data, axis=(0,))
    return rewriter.add("Reshape", f"{name}_plain", rewriter.copy(node, [data, *inputs[1:]]), shape=(0, 0, 0, 0))


Rule = Callable[[_Rewriter, dict, list], Union[Entry, None]]
# A rule returns the output that takes the node's place, or None where the node stays.
RULES: dict[str, Rule] = {
    "mean": _mean,
    "Pooling": _global_pooling,
    "broadcast_mul": _scale_channels,
    "Convolution": _narrow_groups,
}


def _tuple(text: str | None) -> tuple:
    value = ast.literal_eval(text) if text else ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _true(text: str | None) -> bool:
    return text in ("True", "true", "1")
