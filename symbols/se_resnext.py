"""SE-ResNeXt (arXiv 1709.01507 on arXiv 1611.05431): post-activation units with grouped 3 x 3 convolutions."""

from __future__ import annotations

from architectures import RESNEXT_WIDTH, SEResNeXtOptions
from symbols import blocks, layers
from symbols.layers import Symbol


def build(data: Symbol, options: SEResNeXtOptions) -> Symbol:
    """The whole network, `data` (N, 3, H, W) to "softmax" (N, num_classes)."""
    unit = bottleneck_unit if options.table.bottleneck else basic_unit
    body = blocks.residual_stages(blocks.residual_stem(data, options), unit, options)
    return blocks.classifier(body, "pool1", options)


def bottleneck_unit(
    data: Symbol, name: str, filters: int, stride: int, reshape: bool, options: SEResNeXtOptions
) -> Symbol:
    """1 x 1, grouped 3 x 3, 1 x 1; the stride is the grouped convolution's."""
    width = int(filters * RESNEXT_WIDTH)
    body = layers.conv(data, f"{name}_conv1", width, options)
    body = layers.relu(layers.batch_norm(body, f"{name}_bn1", options), f"{name}_relu1")
    body = layers.conv(
        body,
        f"{name}_conv2",
        width,
        options,
        kernel=(3, 3),
        stride=stride,
        pad=(1, 1),
        groups=options.num_group,
    )
    body = layers.relu(layers.batch_norm(body, f"{name}_bn2", options), f"{name}_relu2")
    body = layers.conv(body, f"{name}_conv3", filters, options)
    body = layers.batch_norm(body, f"{name}_bn3", options)
    return _join(data, body, name, filters, stride, reshape, options)


def basic_unit(data: Symbol, name: str, filters: int, stride: int, reshape: bool, options: SEResNeXtOptions) -> Symbol:
    """Two 3 x 3 convolutions without groups, whatever num_group says."""
    body = layers.conv(data, f"{name}_conv1", filters, options, kernel=(3, 3), stride=stride, pad=(1, 1))
    body = layers.relu(layers.batch_norm(body, f"{name}_bn1", options), f"{name}_relu1")
    body = layers.conv(body, f"{name}_conv2", filters, options, kernel=(3, 3), pad=(1, 1))
    body = layers.batch_norm(body, f"{name}_bn2", options)
    return _join(data, body, name, filters, stride, reshape, options)


def _join(
    data: Symbol, body: Symbol, name: str, filters: int, stride: int, reshape: bool, options: SEResNeXtOptions
) -> Symbol:
    """SE block on the body, plus the shortcut, ReLU."""
    body = blocks.se_block(body, name, filters, options)
    shortcut = data
    if reshape:
        shortcut = layers.conv(data, f"{name}_sc", filters, options, stride=stride)
        shortcut = layers.batch_norm(shortcut, f"{name}_sc_bn", options)
    return layers.relu(layers.add(body, shortcut, f"{name}_add"), f"{name}_relu")
