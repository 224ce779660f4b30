"""The networks as MXNet symbols: `get_symbol(network, **options)`, or their JSON without MXNet: `get_symbol_json`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from architectures import network_options
from symbols.backend import Symbol, declared_input, native_input


def get_symbol(network: str, **options: object) -> Symbol:
    """Declare a network.

    network: "se_resnext", "se_resnet", "se_inception_v4" or "se_inception_resnet_v2". options: those that
    `architectures.option_names(network)` lists (depth, num_group, num_classes, data_type, image_size, drop_out,
    bn_mom, workspace, se_ratio, no_se); what they mean stands at the option classes in `architectures`.

    Returns an `mx.sym.Symbol` with inputs `data` (N, 3, H, W), raw 0-255 float32, and `softmax_label` (N,), ending in
    the SoftmaxOutput "softmax"; where MXNet cannot be imported, a `graph.declare.Symbol` of the same graph. Raises
    OptionError (a ValueError) for a network or option that does not exist.
    """
    return _build(native_input, network, options)


def get_symbol_json(network: str, **options: object) -> str:
    """The JSON of `get_symbol(network, **options)`, to the byte; never imports MXNet."""
    return _build(declared_input, network, options).tojson()


def _build(make_input: Callable[[str], Symbol], network: str, options: dict[str, object]) -> Symbol:
    resolved = network_options(network, **options)
    return importlib.import_module(f"symbols.{network}").build(make_input("data"), resolved)
