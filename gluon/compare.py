"""Logits of one of our networks against those of the GluonCV network that its weights come from."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from errors import UsageError
from gluon.zoo import RawPixels
from mxnet_compat import mx

IMAGES = 2
SEED = 0


def fill(network, params: Mapping[str, np.ndarray]) -> None:
    """Give the network its parameters: "arg:NAME" and "aux:NAME" -> array, all of them."""
    network.initialize("zeros")
    parameters = network.collect_params()
    for key, array in params.items():
        parameters[key.split(":", 1)[1]].set_data(mx.nd.array(array))


def deviation(network, other: RawPixels, weights: str | os.PathLike[str], image_size: int) -> float:
    """Largest difference of the logits on random raw images, as a share of the largest logit of `other`.

    weights: `.params` that GluonCV's network can load. Raises UsageError when it cannot.
    """
    try:
        other.network.load_parameters(os.fspath(weights))
    except (AssertionError, ValueError, mx.MXNetError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{weights}: not the weights of GluonCV's network ({reason})") from None
    images = np.random.default_rng(SEED).integers(0, 256, (IMAGES, 3, image_size, image_size))
    images = mx.nd.array(images, dtype="float32")
    expected = other(images).asnumpy()
    return float(np.abs(network(images).asnumpy() - expected).max() / np.abs(expected).max())
