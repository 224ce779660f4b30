"""SE-ResNeXt (arXiv 1709.01507 on arXiv 1611.05431): post-activation units with grouped 3 x 3 convolutions."""

from __future__ import annotations

from architectures import RESNEXT_WIDTH, SEResNeXtOptions
from gluon import blocks, layers
from gluon.layers import HybridBlock, NamedBlock


def build(options: SEResNeXtOptions) -> HybridBlock:
    """The whole network, images (N, 3, H, W) to logits (N, num_classes)."""
    unit = BottleneckUnit if options.table.bottleneck else BasicUnit
    return layers.sequence(
        blocks.residual_stem(options),
        blocks.residual_stages(unit, options),
        blocks.classifier("pool1", options.table.filters[-1], options),
    )


class Unit(NamedBlock):
    """Body and SE block, plus the shortcut, ReLU; a subclass gives the body."""

    def __init__(self, name: str, channels: int, filters: int, stride: int, reshape: bool, options: SEResNeXtOptions):
        super().__init__(name)
        self.body = layers.sequence(
            *self.body_layers(name, channels, filters, stride, options),
            blocks.SEBlock(name, filters, options),
        )
        self.shortcut = layers.sequence()
        if reshape:
            self.shortcut.add(
                layers.Conv(f"{name}_sc", channels, filters, options, stride=stride),
                layers.BatchNorm(f"{name}_sc_bn", filters, options),
            )
        self.add = layers.Add(f"{name}_add")
        self.relu = layers.relu(f"{name}_relu")

    def hybrid_forward(self, F, x):
        return self.relu(self.add(self.body(x), self.shortcut(x)))


class BottleneckUnit(Unit):
    """1 x 1, grouped 3 x 3, 1 x 1; the stride is the grouped convolution's."""

    @staticmethod
    def body_layers(
        name: str, channels: int, filters: int, stride: int, options: SEResNeXtOptions
    ) -> list[HybridBlock]:
        width = int(filters * RESNEXT_WIDTH)
        grouped = {"kernel": (3, 3), "stride": stride, "pad": (1, 1), "groups": options.num_group}
        return [
            layers.Conv(f"{name}_conv1", channels, width, options),
            layers.BatchNorm(f"{name}_bn1", width, options),
            layers.relu(f"{name}_relu1"),
            layers.Conv(f"{name}_conv2", width, width, options, **grouped),
            layers.BatchNorm(f"{name}_bn2", width, options),
            layers.relu(f"{name}_relu2"),
            layers.Conv(f"{name}_conv3", width, filters, options),
            layers.BatchNorm(f"{name}_bn3", filters, options),
        ]


class BasicUnit(Unit):
    """Two 3 x 3 convolutions without groups, whatever num_group says."""

    @staticmethod
    def body_layers(
        name: str, channels: int, filters: int, stride: int, options: SEResNeXtOptions
    ) -> list[HybridBlock]:
        window = {"kernel": (3, 3), "pad": (1, 1)}
        return [
            layers.Conv(f"{name}_conv1", channels, filters, options, stride=stride, **window),
            layers.BatchNorm(f"{name}_bn1", filters, options),
            layers.relu(f"{name}_relu1"),
            layers.Conv(f"{name}_conv2", filters, filters, options, **window),
            layers.BatchNorm(f"{name}_bn2", filters, options),
        ]
