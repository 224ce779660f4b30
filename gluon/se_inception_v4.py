"""SE-Inception-v4 (arXiv 1709.01507 on arXiv 1602.07261): an SE block after every Inception block."""

from __future__ import annotations

from architectures import INCEPTION_V4, InceptionOptions
from gluon import inception
from gluon.layers import HybridBlock


def build(options: InceptionOptions) -> HybridBlock:
    """The whole network, images (N, 3, H, W) to logits (N, num_classes)."""
    return inception.build(INCEPTION_V4, options)
