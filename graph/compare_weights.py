"""Logits of imported weights against those of the PyTorch network that they come from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from errors import UsageError
from graph.symbol_json import Graph
from graph.to_torch import load_params, to_torch

IMAGES = 2
SEED = 0


def compare_with_torch(
    maker: str,
    source: Mapping[str, np.ndarray],
    graph: Graph,
    params: Mapping[str, np.ndarray],
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> float:
    """Largest difference of the logits as a share of the largest logit, on random images.

    maker: "MODULE:FUNCTION"; the function, called without arguments, returns the source's network.
    """
    network = make_network(maker)
    try:
        network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in source.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--compare {maker}: its network does not take the weights: {reason}") from None
    images = np.random.default_rng(SEED).integers(0, 256, (IMAGES, 3, image_size, image_size)).astype(np.float32)
    offsets, scales = (np.array(values, np.float32).reshape((1, 3, 1, 1)) for values in (mean, std))
    ours = to_torch(logits_of(graph), {"data": images.shape})
    load_params(ours, params)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy((images / 255 - offsets) / scales))
        logits = ours.eval()(torch.from_numpy(images))
    return float((logits - expected).abs().max() / expected.abs().max())


def logits_of(graph: Graph) -> Graph:
    """The graph without the SoftmaxOutput at its end."""
    last = graph.nodes[graph.heads[0].node]
    return replace(graph, heads=last.inputs[:1]) if last.op == "SoftmaxOutput" else graph


def make_network(maker: str) -> torch.nn.Module:
    """What "MODULE:FUNCTION" makes; UsageError when there is no such thing."""
    module, _, function = maker.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--compare {maker}: {error}; give MODULE:FUNCTION of an installed package") from None
