"""Parts that several families share: the SE block, the stem and the stages of residual networks, the classifier."""

from __future__ import annotations

from typing import Callable

from architectures import NetworkOptions, SEResNetOptions
from gluon import layers
from gluon.layers import HybridBlock, NamedBlock

# (name, input channels, filters, stride, whether the shortcut changes the shape, options) -> one residual unit
Unit = Callable[[str, int, int, int, bool, SEResNetOptions], HybridBlock]

IMAGE_CHANNELS = 3


class SEBlock(NamedBlock):
    """Squeeze-and-excitation (arXiv 1709.01507, figure 2): rescale the channels by what their means say.

    x (N, channels, H, W) -> the same shape; the plain twin of a network passes x through.
    """

    def __init__(self, name: str, channels: int, options: NetworkOptions):
        super().__init__(name)
        self._plain = options.no_se
        if self._plain:
            return
        hidden = options.se_hidden(channels)
        self.excitation = layers.sequence(
            layers.GlobalAverage(f"{name}_squeeze"),
            layers.Dense(f"{name}_excitation1", channels, hidden),
            layers.relu(f"{name}_excitation1_relu"),
            layers.Dense(f"{name}_excitation2", hidden, channels),
            layers.Activation(f"{name}_excitation2_sigmoid", "sigmoid"),
        )
        self.scale = layers.ScaleChannels(f"{name}_scale", channels)

    def hybrid_forward(self, F, x):
        return x if self._plain else self.scale(x, self.excitation(x))


def residual_stem(options: SEResNetOptions) -> HybridBlock:
    """Input BatchNorm, which stands for mean/std normalisation of raw 0-255 pixels, and the first convolution."""
    filters = options.table.filters[0]
    bn_data = layers.BatchNorm("bn_data", IMAGE_CHANNELS, options, fix_gamma=True)
    if options.stem == "cifar":
        conv = layers.Conv("conv0", IMAGE_CHANNELS, filters, options, kernel=(3, 3), pad=(1, 1))
        return layers.sequence(bn_data, conv)
    return layers.sequence(
        bn_data,
        layers.Conv("conv0", IMAGE_CHANNELS, filters, options, kernel=(7, 7), stride=2, pad=(3, 3)),
        layers.BatchNorm("bn0", filters, options),
        layers.relu("relu0"),
        layers.Pool("pool0", "max", pad=1),
    )


def residual_stages(unit: Unit, options: SEResNetOptions) -> HybridBlock:
    """All stages; the first unit of a stage changes the shape, from the second stage on with stride 2."""
    table = options.table
    channels = table.filters[0]
    stages = layers.sequence()
    for stage, (units, filters) in enumerate(zip(table.units, table.filters[1:]), start=1):
        for index in range(1, units + 1):
            stride = 2 if index == 1 and stage > 1 else 1
            stages.add(unit(f"stage{stage}_unit{index}", channels, filters, stride, index == 1, options))
            channels = filters
    return stages


def classifier(pool_name: str, channels: int, options: NetworkOptions) -> HybridBlock:
    """Global average, dropout and the last layer "fc1": (N, channels, H, W) -> logits (N, num_classes)."""
    return layers.sequence(
        layers.GlobalAverage(pool_name),
        layers.Dropout("dp1", options.drop_out),
        layers.Dense("fc1", channels, options.num_classes),
    )
