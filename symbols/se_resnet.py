"""SE-ResNet (arXiv 1709.01507 on arXiv 1603.05027): pre-activation units, BatchNorm and ReLU before convolutions."""

from __future__ import annotations

from architectures import RESNET_WIDTH, SEResNetOptions
from symbols import blocks, layers
from symbols.layers import Symbol


def build(data: Symbol, options: SEResNetOptions) -> Symbol:
    """The whole network, `data` (N, 3, H, W) to "softmax" (N, num_classes)."""
    unit = bottleneck_unit if options.table.bottleneck else basic_unit
    body = blocks.residual_stages(blocks.residual_stem(data, options), unit, options)
    body = layers.relu(layers.batch_norm(body, "bn1", options), "relu1")
    return blocks.classifier(body, "pool1", options)


def bottleneck_unit(
    data: Symbol, name: str, filters: int, stride: int, reshape: bool, options: SEResNetOptions
) -> Symbol:
    """1 x 1, 3 x 3, 1 x 1; the stride is the 3 x 3 convolution's."""
    width = int(filters * RESNET_WIDTH)
    first = layers.relu(layers.batch_norm(data, f"{name}_bn1", options), f"{name}_relu1")
    body = layers.conv(first, f"{name}_conv1", width, options)
    body = layers.relu(layers.batch_norm(body, f"{name}_bn2", options), f"{name}_relu2")
    body = layers.conv(body, f"{name}_conv2", width, options, kernel=(3, 3), stride=stride, pad=(1, 1))
    body = layers.relu(layers.batch_norm(body, f"{name}_bn3", options), f"{name}_relu3")
    body = layers.conv(body, f"{name}_conv3", filters, options)
    return _join(data, first, body, name, filters, stride, reshape, options)


def basic_unit(data: Symbol, name: str, filters: int, stride: int, reshape: bool, options: SEResNetOptions) -> Symbol:
    """Two 3 x 3 convolutions."""
    first = layers.relu(layers.batch_norm(data, f"{name}_bn1", options), f"{name}_relu1")
    body = layers.conv(first, f"{name}_conv1", filters, options, kernel=(3, 3), stride=stride, pad=(1, 1))
    body = layers.relu(layers.batch_norm(body, f"{name}_bn2", options), f"{name}_relu2")
    body = layers.conv(body, f"{name}_conv2", filters, options, kernel=(3, 3), pad=(1, 1))
    return _join(data, first, body, name, filters, stride, reshape, options)


def _join(
    data: Symbol,
    first: Symbol,
    body: Symbol,
    name: str,
    filters: int,
    stride: int,
    reshape: bool,
    options: SEResNetOptions,
) -> Symbol:
    """SE block on the body, plus the shortcut; a shortcut that changes the shape starts after the first activation."""
    body = blocks.se_block(body, name, filters, options)
    shortcut = layers.conv(first, f"{name}_sc", filters, options, stride=stride) if reshape else data
    return layers.add(body, shortcut, f"{name}_add")
