"""SE-Inception-v4 (arXiv 1709.01507 on arXiv 1602.07261): an SE block after every Inception block."""

from __future__ import annotations

from architectures import INCEPTION_V4, InceptionOptions
from symbols import inception
from symbols.layers import Symbol


def build(data: Symbol, options: InceptionOptions) -> Symbol:
    """The whole network, `data` (N, 3, H, W) to "softmax" (N, num_classes)."""
    return inception.build(data, INCEPTION_V4, options)
