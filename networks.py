"""From flags to a declared network."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from training.options import network_flags


@dataclass(frozen=True)
class Network:
    """A declared graph and what the run needs to know of it.

    symbol: mx.sym.Symbol; json: its JSON. shapes: "arg:NAME" and "aux:NAME" -> shape of every parameter, in the order
    of list_arguments() and list_auxiliary_states(). parameters: elements of all arguments but the inputs.
    multiply_adds: of convolutions and fully connected layers for one image.
    """

    name: str
    symbol: object
    json: str
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    multiply_adds: int
    classes: int
    image_shape: tuple[int, int, int]


def declare(args: argparse.Namespace, classes: int) -> Network:
    """Declare the network that the flags name, for `classes` classes; UsageError where it does not exist."""
    from symbols import count, get_symbol

    symbol = get_symbol(args.network, **network_flags(args, classes))
    image_shape = (3, args.image_size, args.image_size)
    inputs = {"data": (1, *image_shape), "softmax_label": (1,)}
    arg_shapes, _, aux_shapes = symbol.infer_shape(**inputs)
    shapes = {f"arg:{n}": s for n, s in zip(symbol.list_arguments(), arg_shapes) if n not in inputs}
    shapes.update({f"aux:{n}": s for n, s in zip(symbol.list_auxiliary_states(), aux_shapes)})
    parameters, multiply_adds = count(symbol, image_shape)
    return Network(args.network, symbol, symbol.tojson(), shapes, parameters, multiply_adds, classes, image_shape)
