"""Parts that several families share: the SE block, the stem and the stages of residual networks, the classifier."""

from __future__ import annotations

from typing import Callable

from architectures import NetworkOptions, SEResNetOptions
from symbols import layers
from symbols.layers import Symbol

# (data, name, filters, stride, whether the shortcut changes the shape, options) -> output of one residual unit
Unit = Callable[[Symbol, str, int, int, bool, SEResNetOptions], Symbol]


def se_block(data: Symbol, name: str, channels: int, options: NetworkOptions) -> Symbol:
    """Squeeze-and-excitation (arXiv 1709.01507, figure 2): rescale the channels by what their means say.

    data (N, channels, H, W) -> the same shape; the plain twin of a network passes data through.
    """
    if options.no_se:
        return data
    squeeze = layers.global_average(data, f"{name}_squeeze")
    hidden = layers.dense(squeeze, f"{name}_excitation1", options.se_hidden(channels))
    hidden = layers.relu(hidden, f"{name}_excitation1_relu")
    excitation = layers.dense(hidden, f"{name}_excitation2", channels)
    excitation = layers.sigmoid(excitation, f"{name}_excitation2_sigmoid")
    return layers.scale_channels(data, excitation, f"{name}_scale", channels)


def residual_stem(data: Symbol, options: SEResNetOptions) -> Symbol:
    """Input BatchNorm, which stands for mean/std normalisation of raw 0-255 pixels, and the first convolution."""
    filters = options.table.filters[0]
    data = layers.batch_norm(data, "bn_data", options, fix_gamma=True)
    if options.stem == "cifar":
        return layers.conv(data, "conv0", filters, options, kernel=(3, 3), pad=(1, 1))
    body = layers.conv(data, "conv0", filters, options, kernel=(7, 7), stride=2, pad=(3, 3))
    body = layers.relu(layers.batch_norm(body, "bn0", options), "relu0")
    return layers.max_pool(body, "pool0", pad=1)


def residual_stages(body: Symbol, unit: Unit, options: SEResNetOptions) -> Symbol:
    """All stages; the first unit of a stage changes the shape, from the second stage on with stride 2."""
    table = options.table
    for stage, (units, filters) in enumerate(zip(table.units, table.filters[1:]), start=1):
        for index in range(1, units + 1):
            stride = 2 if index == 1 and stage > 1 else 1
            body = unit(body, f"stage{stage}_unit{index}", filters, stride, index == 1, options)
    return body


def classifier(body: Symbol, pool_name: str, options: NetworkOptions) -> Symbol:
    """Global average, dropout, the last layer "fc1" and "softmax"."""
    features = layers.global_average(body, pool_name)
    features = layers.dropout(features, "dp1", options.drop_out)
    return layers.softmax_output(layers.dense(features, "fc1", options.num_classes), "softmax")
