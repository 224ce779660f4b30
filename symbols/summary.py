"""What a declared network costs: output shapes, parameters and multiply-adds of its layers; needs no MXNet."""

from __future__ import annotations

import math
from typing import NamedTuple

from graph.shapes import Shapes, infer
from graph.symbol_json import Entry, Graph

# BatchNorm at inference is a scale and a shift; the others are how layers.py declares the product of an SE block.
ONE_AN_ELEMENT = ("BatchNorm", "broadcast_mul", "batch_dot")
WEIGHTED = ("Convolution", "FullyConnected")


class Layer(NamedTuple):
    """A node of the graph that is no variable.

    output_shape: without the batch axis. parameters: elements of the layer's own arguments (moving statistics are no
    arguments). multiply_adds: for one image, see `_multiply_adds`.
    """

    name: str
    op: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layers(graph: Graph, data_shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of `graph` in its order, for images of shape `data_shape` (3, H, W).

    Raises GraphError where images of that shape do not fit.
    """
    shapes = infer(graph, {"data": (1, *data_shape)})
    # What no layer owns; a parameter that several share belongs to the first.
    owned = {"data", *graph.auxiliary, *(name for name in graph.arguments if name.endswith("_label"))}
    found = []
    for index in graph.order:
        node = graph.nodes[index]
        if node.is_variable:
            continue
        sources = [graph.nodes[entry.node] for entry in node.inputs]
        own = {source.name for source in sources if source.is_variable} - owned
        owned |= own
        parameters = sum(math.prod(shapes.variables[name]) for name in own)
        output = shapes.outputs[Entry(index)]
        found.append(Layer(node.name, node.op, output[1:], parameters, _multiply_adds(graph, index, shapes)))
    return found


def count(graph: Graph, data_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters and multiply-adds (for one image) of all layers."""
    found = layers(graph, data_shape)
    return sum(layer.parameters for layer in found), sum(layer.multiply_adds for layer in found)


def _multiply_adds(graph: Graph, index: int, shapes: Shapes) -> int:
    """Convolutions and fully connected layers: output positions times elements of the weight. BatchNorms and the
    scaling of channels by an SE block: one an element. Bias, pooling, activations and sums count nothing.

    So counted, SE-ResNeXt-50 and its plain twin give the 4.25 and 4.24 G of the SENet paper (1709.01507, table 2).
    """
    node, output = graph.nodes[index], shapes.outputs[Entry(index)]
    if node.op in ONE_AN_ELEMENT:
        return math.prod(output)
    if node.op not in WEIGHTED:
        return 0
    return math.prod(output[2:]) * math.prod(shapes.outputs[node.inputs[1]])
