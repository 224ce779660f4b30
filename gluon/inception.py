"""The walk that turns the Inception tables of `architectures` into blocks; both Inception families use it.

Every builder takes the number of channels that come in and returns a block and the number that go out.
"""

from __future__ import annotations

from architectures import AddInput, Concat, Conv, Fork, InceptionOptions, InceptionRow, Norm, Pool, Stage
from gluon import blocks, layers
from gluon.layers import HybridBlock, NamedBlock

Built = tuple[HybridBlock, int]


def build(stages: tuple[Stage, ...], options: InceptionOptions) -> HybridBlock:
    """The whole network, images (N, 3, H, W) to logits (N, num_classes)."""
    network = layers.sequence()
    channels = blocks.IMAGE_CHANNELS
    for stage in stages:
        for name in stage.block_names:
            block, channels = _rows(stage.block, channels, name, options)
            network.add(block)
            if stage.se:
                network.add(blocks.SEBlock(name, stage.channels, options))
    network.add(blocks.classifier("global_pool", channels, options))
    return network


class Rows(NamedBlock):
    """Rows one after the other; an AddInput also sees what the first row saw."""

    def __init__(self, name: str, rows: list[HybridBlock]):
        super().__init__(name)
        self.rows = layers.sequence(*rows)

    def hybrid_forward(self, F, x):
        body = x
        for row in self.rows:
            body = row(body, x) if isinstance(row, ScaledSum) else row(body)
        return body


class Branches(NamedBlock):
    """The outputs of several branches on one input, as a flat list."""

    def __init__(self, name: str, branches: list[HybridBlock]):
        super().__init__(name)
        self.branches = layers.sequence(*branches)

    def hybrid_forward(self, F, x):
        outputs = [branch(x) for branch in self.branches]
        return [part for output in outputs for part in (output if isinstance(output, list) else [output])]


class Join(NamedBlock):
    """Branches joined along the channels."""

    def __init__(self, name: str, branches: Branches):
        super().__init__(name)
        self.branches = branches

    def hybrid_forward(self, F, x):
        return F.Concat(*self.branches(x), dim=1, name=self.node)


class ScaledSum(NamedBlock):
    """The input of a block plus `factor` times what the block computed."""

    def __init__(self, name: str, factor: float):
        super().__init__(name)
        self.scale = layers.Multiply(f"{name}_scale_residual", factor)
        self.add = layers.Add(f"{name}_add")

    def hybrid_forward(self, F, body, x):
        return self.add(x, self.scale(body))


def _rows(rows: tuple[InceptionRow, ...], channels: int, block: str, options: InceptionOptions) -> Built:
    built = []
    for row in rows:
        layer, channels = _row(row, channels, block, options)
        built.append(layer)
    return Rows(block, built), channels


def _row(row: InceptionRow, channels: int, block: str, options: InceptionOptions) -> Built:
    if isinstance(row, Fork):
        return _branches(row.branches, channels, block, options)
    elif isinstance(row, Conv):
        return _conv(row, channels, block, options), row.filters
    elif isinstance(row, Pool):
        return layers.Pool(f"{row.kind}_{block}_{row.name}", row.kind), channels
    elif isinstance(row, Concat):
        branches, joined = _branches(row.branches, channels, block, options)
        return Join(f"{block}_{row.name}", branches), joined
    elif isinstance(row, AddInput):
        return ScaledSum(f"{block}_{row.name}", row.scale), channels
    elif isinstance(row, Norm):
        prefix = f"{block}_{row.name}" if row.name else block
        norm = layers.BatchNorm(f"{prefix}_bn1", channels, options)
        return layers.sequence(norm, layers.relu(f"{prefix}_relu1")), channels
    raise TypeError(f"{block}: {row!r} is not a row of an Inception table")


def _branches(branches: tuple, channels: int, block: str, options: InceptionOptions) -> Built:
    built = [_rows(branch, channels, block, options) for branch in branches]
    return Branches(block, [layer for layer, _ in built]), sum(outputs for _, outputs in built)


def _conv(row: Conv, channels: int, block: str, options: InceptionOptions) -> HybridBlock:
    name = f"{block}_{row.name}"
    window = {"kernel": row.kernel, "stride": row.stride, "pad": row.pad}
    conv = layers.Conv(f"{name}_conv2d", channels, row.filters, options, bias=True, **window)
    return layers.sequence(conv, layers.relu(f"{name}_relu")) if row.relu else conv
