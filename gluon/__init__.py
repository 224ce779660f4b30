"""The networks as Gluon HybridBlocks: `get_network(network, **options)`."""

from __future__ import annotations

import importlib

from architectures import network_options


def get_network(network: str, **options: object):
    """Declare a network.

    network and options: those of `symbols.get_symbol`, with the same defaults and the same meaning.

    Returns a `mxnet.gluon.HybridBlock` that maps images (N, 3, H, W), raw 0-255 float32, to logits (N, num_classes).
    Its parameters are not initialised; their names, shapes and order are those of the symbol, so arrays move both
    ways by name. Raises OptionError (a ValueError) for a network or option that does not exist.
    """
    resolved = network_options(network, **options)
    return importlib.import_module(f"gluon.{network}").build(resolved)
