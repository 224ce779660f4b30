"""Less memory for more time: a translated graph whose backward pass computes activations again, unit by unit.

The graph is cut where exactly one value crosses, after every place where branches join: in residual networks these
are the ends of the units. Only the values at the cuts are kept between forward and backward (Chen et al. 2016,
arXiv 1604.06174).
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from graph.to_torch import IN_PLACE
from graph.torch_ops import BatchNorm, Dropout

JOINS = (torch.add, operator.iadd, torch.cat)
_OVERWRITERS = frozenset(IN_PLACE.values())


class RecomputedGraph:
    """Called like the module it is made from, with whose parameters it works: `graph(data, label)`."""

    def __init__(self, module: fx.GraphModule):
        self._module = module
        self._segments = [_extract(module, nodes, source) for nodes, source in _segments(module.graph)]
        self._random = any(isinstance(part, Dropout) for part in module.modules())

    def __len__(self) -> int:
        return len(self._segments)

    def __call__(self, data: Tensor, label: Tensor | None = None) -> Tensor:
        value = data
        for segment in self._segments[:-1]:
            context = functools.partial(_contexts, segment)
            value = checkpoint(segment, value, use_reentrant=False, preserve_rng_state=self._random, context_fn=context)
        return self._segments[-1](value, label)


def _contexts(segment: fx.GraphModule):
    """Contexts of the first and the second computation; the second must not move the statistics again."""
    return contextlib.nullcontext(), _frozen_statistics(segment)


@contextlib.contextmanager
def _frozen_statistics(segment: fx.GraphModule) -> Iterator[None]:
    layers = [part for part in segment.modules() if isinstance(part, BatchNorm)]
    for layer in layers:
        layer.frozen = True
    try:
        yield
    finally:
        for layer in layers:
            layer.frozen = False


def _segments(graph: fx.Graph) -> list[tuple[list[fx.Node], fx.Node]]:
    """Consecutive parts of the graph and the one value that each needs from before; the last ends with the output."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
    data = next(node for node in graph.nodes if node.op == "placeholder")
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in [data, *nodes]}
    segments: list[tuple[list[fx.Node], fx.Node]] = []
    part: list[fx.Node] = []
    source, joined, reach = data, False, last_use[data]
    for index, node in enumerate(nodes):
        part.append(node)
        joined = joined or node.target in JOINS
        alone = reach <= index  # nothing older than this node is read after it
        overwritten = any(user.target in _OVERWRITERS and user.args[0] is node for user in node.users)
        if joined and alone and not overwritten and node.op != "output":
            segments.append((part, source))
            part, source, joined = [], node, False
        reach = max(reach, last_use[node])
    return [*segments, (part, source)]


def _extract(module: fx.GraphModule, nodes: list[fx.Node], source: fx.Node) -> fx.GraphModule:
    """A module of these nodes, on the parameters of the whole, with `source` as its input (and the label, if last)."""
    graph = fx.Graph()
    copies = {source: graph.placeholder(source.name)}
    ends = nodes[-1].op == "output"
    if ends:
        labels = [node for node in module.graph.nodes if node.op == "placeholder"][1:]
        copies.update({label: graph.placeholder(label.name, default_value=None) for label in labels})
        if not labels:
            graph.placeholder("label", default_value=None)

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter, entered where it is first read
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
    if not ends:
        graph.output(copies[nodes[-1]])
    return fx.GraphModule(module, graph, "Unit")
