"""The walk that turns the Inception tables of `architectures` into a graph; both Inception families use it."""

from __future__ import annotations

from architectures import AddInput, Concat, Conv, Fork, InceptionOptions, InceptionRow, Norm, Pool, Stage
from symbols import blocks, layers
from symbols.layers import Symbol


def build(data: Symbol, stages: tuple[Stage, ...], options: InceptionOptions) -> Symbol:
    """The whole network, `data` (N, 3, H, W) to "softmax" (N, num_classes)."""
    body = data
    for stage in stages:
        for name in stage.block_names:
            (body,) = _rows(stage.block, body, name, options)
            if stage.se:
                body = blocks.se_block(body, name, stage.channels, options)
    return blocks.classifier(body, "global_pool", options)


def _rows(rows: tuple[InceptionRow, ...], data: Symbol, block: str, options: InceptionOptions) -> list[Symbol]:
    """Outputs of a sequence of rows: one, or those of all branches when it ends in a Fork."""
    body = data
    for row in rows:
        if isinstance(row, Fork):
            return _branches(row.branches, body, block, options)
        elif isinstance(row, Conv):
            body = _conv(row, body, block, options)
        elif isinstance(row, Pool):
            pool = {"avg": layers.avg_pool, "max": layers.max_pool}[row.kind]
            body = pool(body, f"{row.kind}_{block}_{row.name}")
        elif isinstance(row, Concat):
            body = layers.concat(_branches(row.branches, body, block, options), f"{block}_{row.name}")
        elif isinstance(row, AddInput):
            body = layers.multiply(body, row.scale, f"{block}_{row.name}_scale_residual")
            body = layers.add(data, body, f"{block}_{row.name}_add")
        elif isinstance(row, Norm):
            prefix = f"{block}_{row.name}" if row.name else block
            body = layers.relu(layers.batch_norm(body, f"{prefix}_bn1", options), f"{prefix}_relu1")
    return [body]


def _branches(branches: tuple, data: Symbol, block: str, options: InceptionOptions) -> list[Symbol]:
    return [output for branch in branches for output in _rows(branch, data, block, options)]


def _conv(row: Conv, data: Symbol, block: str, options: InceptionOptions) -> Symbol:
    name = f"{block}_{row.name}"
    body = layers.conv(
        data,
        f"{name}_conv2d",
        row.filters,
        options,
        kernel=row.kernel,
        stride=row.stride,
        pad=row.pad,
        bias=True,
    )
    return layers.relu(body, f"{name}_relu") if row.relu else body
