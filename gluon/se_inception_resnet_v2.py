"""SE-Inception-ResNet-v2 (arXiv 1709.01507 on arXiv 1602.07261): residual Inception blocks scaled by 0.1."""

from __future__ import annotations

from architectures import INCEPTION_RESNET_V2, InceptionOptions
from gluon import inception
from gluon.layers import HybridBlock


def build(options: InceptionOptions) -> HybridBlock:
    """The whole network, images (N, 3, H, W) to logits (N, num_classes)."""
    return inception.build(INCEPTION_RESNET_V2, options)
