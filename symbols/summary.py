"""What a declared network costs: output shapes, parameters and multiply-adds of its layers."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from mxnet_compat import mx


# BatchNorm at inference is a scale and a shift; the others are how layers.py declares the product of an SE block.
ONE_AN_ELEMENT = ("BatchNorm", "broadcast_mul", "batch_dot")


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


def layers(symbol: mx.sym.Symbol, data_shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of `symbol` in the graph's order, for images of shape `data_shape` (3, H, W)."""
    shapes = _shapes(symbol, data_shape)
    inputs = {"data", *(name for name in symbol.list_arguments() if name.endswith("_label"))}
    auxiliary = set(symbol.list_auxiliary_states())
    nodes = json.loads(symbol.tojson())["nodes"]
    counted: set[str] = set()
    found = []
    for node in nodes:
        if node["op"] == "null":
            continue
        sources = [nodes[entry[0]] for entry in node["inputs"]]
        own = [n["name"] for n in sources if n["op"] == "null" and n["name"] not in inputs | auxiliary | counted]
        counted.update(own)
        parameters = sum(math.prod(shapes[name]) for name in own)
        output = shapes[f"{node['name']}_output"]
        found.append(Layer(node["name"], node["op"], output[1:], parameters, _multiply_adds(node, sources, shapes)))
    return found


def count(symbol: mx.sym.Symbol, data_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters and multiply-adds (for one image) of all layers."""
    found = layers(symbol, data_shape)
    return sum(layer.parameters for layer in found), sum(layer.multiply_adds for layer in found)


def _multiply_adds(node: dict, sources: list[dict], shapes: dict[str, tuple[int, ...]]) -> int:
    """Convolutions and fully connected layers: output positions times elements of the weight. BatchNorms and the
    scaling of channels by an SE block: one an element. Bias, pooling, activations and sums count nothing.

    So counted, SE-ResNeXt-50 and its plain twin give the 4.25 and 4.24 G of the SENet paper (1709.01507, table 2).
    """
    output = shapes[f"{node['name']}_output"]
    if node["op"] in ONE_AN_ELEMENT:
        return math.prod(output)
    if node["op"] not in ("Convolution", "FullyConnected"):
        return 0
    return math.prod(output[2:]) * math.prod(shapes[sources[1]["name"]])


def _shapes(symbol: mx.sym.Symbol, data_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Shape of every variable and every output ("NAME_output"; the first one of several) for one image."""
    internals = symbol.get_internals()
    _, outputs, _ = internals.infer_shape(data=(1, *data_shape))
    return {
        (name[:-1] if name.endswith("_output0") else name): tuple(shape)
        for name, shape in zip(internals.list_outputs(), outputs)
    }
