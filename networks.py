"""From flags to a declared network; needs no MXNet."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from training.options import ZOO_PREFIX, network_flags


@dataclass(frozen=True)
class Network:
    """A declared graph and what the run needs to know of it.

    json: the graph as MXNet's Symbol JSON. shapes: "arg:NAME" and "aux:NAME" -> shape of every parameter, in the order
    of list_arguments() and list_auxiliary_states(). initializers: parameter -> its own initializer, where it declares
    one (`__init__`). pretrained: "arg:NAME" and "aux:NAME" -> array to start from; empty without --pretrained.
    parameters: elements of all arguments but the inputs. multiply_adds: for one image, see symbols.summary.
    """

    name: str
    json: str
    shapes: dict[str, tuple[int, ...]]
    initializers: dict[str, str]
    pretrained: dict[str, np.ndarray]
    parameters: int
    multiply_adds: int
    classes: int
    image_shape: tuple[int, int, int]


def declare(args: argparse.Namespace, classes: int) -> Network:
    """Declare the network that the flags name, for `classes` classes; UsageError where it does not exist."""
    from graph.shapes import parameter_shapes
    from graph.symbol_json import parse
    from symbols.summary import count

    json = _declared_json(args, classes)
    graph = parse(json)
    image_shape = (3, args.image_size, args.image_size)
    shapes = parameter_shapes(graph, {"data": (1, *image_shape), "softmax_label": (1,)})
    parameters, multiply_adds = count(graph, image_shape)
    initializers = {node.name: node.hidden("init") for node in graph.nodes if node.is_variable and node.hidden("init")}
    return Network(
        args.network, json, shapes, initializers, _pretrained(args, classes), parameters, multiply_adds, classes,
        image_shape,
    )  # fmt: skip


def print_networks() -> int:
    """Print every name that --network takes, one a line; returns the exit status."""
    from architectures import NETWORKS
    from gluon.zoo import list_networks

    print("\n".join([*NETWORKS, *list_networks()]))
    return 0


def _declared_json(args: argparse.Namespace, classes: int) -> str:
    if args.network.startswith(ZOO_PREFIX):
        from gluon.zoo import declared_graph

        return declared_graph(args.network, classes).tojson()
    from symbols import get_symbol_json

    return get_symbol_json(args.network, **network_flags(args, classes))


def _pretrained(args: argparse.Namespace, classes: int) -> dict[str, np.ndarray]:
    if not args.pretrained:
        return {}
    from gluon.zoo import pretrained_params

    return pretrained_params(args.network, classes)
