"""SE-ResNet (arXiv 1709.01507 on 1603.05027): pre-activation units, BatchNorm and ReLU before the convolutions."""

from __future__ import annotations

from architectures import RESNET_WIDTH, SEResNetOptions
from gluon import blocks, layers
from gluon.layers import HybridBlock, NamedBlock


def build(options: SEResNetOptions) -> HybridBlock:
    """The whole network, images (N, 3, H, W) to logits (N, num_classes)."""
    unit = BottleneckUnit if options.table.bottleneck else BasicUnit
    channels = options.table.filters[-1]
    return layers.sequence(
        blocks.residual_stem(options),
        blocks.residual_stages(unit, options),
        layers.BatchNorm("bn1", channels, options),
        layers.relu("relu1"),
        blocks.classifier("pool1", channels, options),
    )


class Unit(NamedBlock):
    """Body and SE block, plus the shortcut; a subclass gives the body.

    A shortcut that changes the shape starts after the first activation.
    """

    def __init__(self, name: str, channels: int, filters: int, stride: int, reshape: bool, options: SEResNetOptions):
        super().__init__(name)
        self._reshape = reshape
        self.first = layers.sequence(layers.BatchNorm(f"{name}_bn1", channels, options), layers.relu(f"{name}_relu1"))
        self.body = layers.sequence(
            *self.body_layers(name, channels, filters, stride, options),
            blocks.SEBlock(name, filters, options),
        )
        if reshape:
            self.shortcut = layers.Conv(f"{name}_sc", channels, filters, options, stride=stride)
        self.add = layers.Add(f"{name}_add")

    def hybrid_forward(self, F, x):
        first = self.first(x)
        body = self.body(first)
        return self.add(body, self.shortcut(first) if self._reshape else x)


class BottleneckUnit(Unit):
    """1 x 1, 3 x 3, 1 x 1; the stride is the 3 x 3 convolution's."""

    @staticmethod
    def body_layers(name: str, channels: int, filters: int, stride: int, options: SEResNetOptions) -> list[HybridBlock]:
        width = int(filters * RESNET_WIDTH)
        return [
            layers.Conv(f"{name}_conv1", channels, width, options),
            layers.BatchNorm(f"{name}_bn2", width, options),
            layers.relu(f"{name}_relu2"),
            layers.Conv(f"{name}_conv2", width, width, options, kernel=(3, 3), stride=stride, pad=(1, 1)),
            layers.BatchNorm(f"{name}_bn3", width, options),
            layers.relu(f"{name}_relu3"),
            layers.Conv(f"{name}_conv3", width, filters, options),
        ]


class BasicUnit(Unit):
    """Two 3 x 3 convolutions."""

    @staticmethod
    def body_layers(name: str, channels: int, filters: int, stride: int, options: SEResNetOptions) -> list[HybridBlock]:
        window = {"kernel": (3, 3), "pad": (1, 1)}
        return [
            layers.Conv(f"{name}_conv1", channels, filters, options, stride=stride, **window),
            layers.BatchNorm(f"{name}_bn2", filters, options),
            layers.relu(f"{name}_relu2"),
            layers.Conv(f"{name}_conv2", filters, filters, options, **window),
        ]
