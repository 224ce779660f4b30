"""Trains networks on a device that has shapes and places but no numbers: a GPU for machines that have none.

Any operation between tensors of different places fails there as it does on a GPU, so what is left behind on the CPU is
found. A process of its own, because the device stays known to PyTorch: `python -m tests.fake_device` prints, a line for
each network and way to train, where the tensors are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from engines.base import Batch
from engines.torch_engine import TorchEngine
from symbols import get_symbol_json

NAME = "numberless"
ROWS, CLASSES = 4, 10
NETWORKS = {
    "se_resnext": ({"depth": 8, "data_type": "cifar10", "image_size": 16}, 16),
    "se_resnet": ({"depth": 50}, 224),
    "se_inception_v4": ({}, 299),
    "se_inception_resnet_v2": ({}, 299),
}
# The small network every way, the others in the first alone.
WAYS = ({}, {"optimizer": "sgd"}, {"optimizer": "adam"}, {"accumulate": 2})


def moved(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, whose own way of exchanging tensors is not open to tensors without numbers."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            part._parameters[name] = nn.Parameter(function(tensor.detach()), tensor.requires_grad)
        for name, tensor in part._buffers.items():
            part._buffers[name] = function(tensor)
    return module


def train(network: str, options: dict) -> list[Tensor]:
    """One update and one prediction; what they left."""
    arguments, side = NETWORKS[network]
    symbol = get_symbol_json(network, num_classes=CLASSES, **arguments)
    images = np.zeros((ROWS, 3, side, side), np.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = TorchEngine(symbol, image_shape=images.shape[1:], batch_size=ROWS, device=f"{NAME}:0", **options)
        engine.train_batch(Batch(images, np.arange(ROWS)), lr=0.1)
        engine._module.eval()
        with torch.no_grad():
            probabilities = engine._module(engine._images(images))
    states = [tensor for slot in engine._optimizer.states.values() for tensor in slot.values()]
    return [probabilities, *engine._rows, *states, *engine._module.parameters(), *engine._module.buffers()]


def main() -> int:
    _setup_privateuseone_for_python_backend(NAME)
    nn.Module._apply = moved
    for number, network in enumerate(NETWORKS):
        for options in WAYS[: 1 if number else None]:
            places = {tensor.device.type for tensor in train(network, options)}
            print(network, *options.values(), *sorted(places), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # PyTorch's threads for the device do not end by themselves
