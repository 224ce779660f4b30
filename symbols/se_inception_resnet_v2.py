"""SE-Inception-ResNet-v2 (arXiv 1709.01507 on arXiv 1602.07261): residual Inception blocks scaled by 0.1."""

from __future__ import annotations

from architectures import INCEPTION_RESNET_V2, InceptionOptions
from symbols import inception
from symbols.layers import Symbol


def build(data: Symbol, options: InceptionOptions) -> Symbol:
    """The whole network, `data` (N, 3, H, W) to "softmax" (N, num_classes)."""
    return inception.build(data, INCEPTION_RESNET_V2, options)
