"""From flags to a declared network; needs no MXNet."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from training.options import network_flags


@dataclass(frozen=True)
class Network:
    """A declared graph and what the run needs to know of it.

    json: the graph as MXNet's Symbol JSON. shapes: "arg:NAME" and "aux:NAME" -> shape of every parameter, in the order
    of list_arguments() and list_auxiliary_states(). parameters: elements of all arguments but the inputs.
    multiply_adds: for one image, as symbols.summary counts them.
    """

    name: str
    json: str
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    multiply_adds: int
    classes: int
    image_shape: tuple[int, int, int]


def declare(args: argparse.Namespace, classes: int) -> Network:
    """Declare the network that the flags name, for `classes` classes; UsageError where it does not exist."""
    from graph.shapes import parameter_shapes
    from graph.symbol_json import parse
    from symbols import get_symbol_json
    from symbols.summary import count

    json = get_symbol_json(args.network, **network_flags(args, classes))
    graph = parse(json)
    image_shape = (3, args.image_size, args.image_size)
    shapes = parameter_shapes(graph, {"data": (1, *image_shape), "softmax_label": (1,)})
    parameters, multiply_adds = count(graph, image_shape)
    return Network(args.network, json, shapes, parameters, multiply_adds, classes, image_shape)
