"""The operators of the declared graphs: the only file that calls operators, MXNet's or their stand-ins (`backend`).

Every node is named by its caller after its path and role. Data is float32 (N, C, H, W) unless a docstring says
otherwise; `options` carries what is the same in the whole network (BatchNorm momentum, workspace).
"""

from __future__ import annotations

from architectures import BATCH_NORM_EPS, NetworkOptions
from engines.base import IGNORED_LABEL
from symbols.backend import Symbol, operators


def conv(
    data: Symbol,
    name: str,
    filters: int,
    options: NetworkOptions,
    *,
    kernel: tuple[int, int] = (1, 1),
    stride: int = 1,
    pad: tuple[int, int] = (0, 0),
    groups: int = 1,
    bias: bool = False,
) -> Symbol:
    """2-d convolution (cross-correlation); weight (filters, C / groups, kh, kw)."""
    return operators(data).Convolution(
        data,
        name=name,
        num_filter=filters,
        kernel=kernel,
        stride=(stride, stride),
        pad=pad,
        num_group=groups,
        no_bias=not bias,
        workspace=options.workspace,
    )


def batch_norm(data: Symbol, name: str, options: NetworkOptions, *, fix_gamma: bool = False) -> Symbol:
    """BatchNorm over the channels; MXNet's own default would fix gamma at 1."""
    return operators(data).BatchNorm(data, name=name, fix_gamma=fix_gamma, eps=BATCH_NORM_EPS, momentum=options.bn_mom)


def relu(data: Symbol, name: str) -> Symbol:
    return operators(data).Activation(data, act_type="relu", name=name)


def sigmoid(data: Symbol, name: str) -> Symbol:
    return operators(data).Activation(data, act_type="sigmoid", name=name)


def max_pool(data: Symbol, name: str, *, pad: int = 0) -> Symbol:
    """Maximum over 3 x 3 windows at stride 2."""
    return operators(data).Pooling(data, kernel=(3, 3), stride=(2, 2), pad=(pad, pad), pool_type="max", name=name)


def avg_pool(data: Symbol, name: str) -> Symbol:
    """Average over 3 x 3 windows at stride 1, the padding counted as zeros."""
    return operators(data).Pooling(data, kernel=(3, 3), stride=(1, 1), pad=(1, 1), pool_type="avg", name=name)


def global_average(data: Symbol, name: str) -> Symbol:
    """Mean over the positions: (N, C, H, W) -> (N, C).

    The operators of the original graphs: SE blocks of large networks can turn the last bit of a mean into another
    picture, so only they give the logits that its checkpoints gave. `cpu_training` knows faster ones.
    """
    pooled = operators(data).Pooling(data, global_pool=True, kernel=(7, 7), pool_type="avg", name=name)
    return operators(data).Flatten(pooled, name=f"{name}_flatten")


def scale_channels(data: Symbol, scale: Symbol, name: str, channels: int) -> Symbol:
    """Multiply every channel of `data` by its number in `scale`, (N, channels)."""
    columns = operators(scale).Reshape(scale, shape=(-1, channels, 1, 1), name=f"{name}_reshape")
    return operators(data).broadcast_mul(data, columns, name=name)


def dense(data: Symbol, name: str, units: int) -> Symbol:
    """Fully connected layer with bias: (N, C) -> (N, units)."""
    return operators(data).FullyConnected(data, num_hidden=units, name=name)


def dropout(data: Symbol, name: str, probability: float) -> Symbol:
    """Zero elements with `probability` in training; no node at all for 0."""
    return operators(data).Dropout(data, p=probability, name=name) if probability > 0 else data


def add(left: Symbol, right: Symbol, name: str) -> Symbol:
    """Sum of two symbols of one shape; the arguments of `left` come first in the graph's order."""
    return operators(left).elemwise_add(left, right, name=name)


def multiply(data: Symbol, factor: float, name: str) -> Symbol:
    """Multiply by a constant."""
    return operators(data)._internal._mul_scalar(data, scalar=factor, name=name)


def concat(parts: list[Symbol], name: str) -> Symbol:
    """Join along the channels."""
    return operators(parts[0]).Concat(*parts, dim=1, name=name)


def softmax_output(data: Symbol, name: str) -> Symbol:
    """Class probabilities (N, classes) whose gradient is that of the summed cross entropy with the labels (N,).

    Rows labelled IGNORED_LABEL, the padding of a last batch, get no gradient.
    """
    return operators(data).SoftmaxOutput(data, name=name, use_ignore=True, ignore_label=IGNORED_LABEL)
