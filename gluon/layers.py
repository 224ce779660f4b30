"""The layers of the Gluon networks, in the arithmetic and under the names of the declared graphs.

Every layer is given the full name of its node and the number of its input channels. Its own prefix is empty, so
the names of parameters and, when a network is traced, of nodes do not depend on where a layer sits. Gluon's own
layers would call BatchNorm's statistics `running_*` where MXNet's graphs, and files, have `moving_*`.
Data is float32 (N, C, H, W) unless a docstring says otherwise.
"""

from __future__ import annotations

from architectures import BATCH_NORM_EPS, NetworkOptions
from mxnet_compat import mx  # noqa: F401 - puts MXNet right before its sub-modules are imported

from mxnet.gluon import HybridBlock, nn  # isort: skip


def sequence(*layers: HybridBlock) -> HybridBlock:
    """Layers one after the other."""
    block = nn.HybridSequential(prefix="")
    block.add(*layers)
    return block


class NamedBlock(HybridBlock):
    """A block that adds nothing to the names below it; `name` is the full name of its node."""

    def __init__(self, name: str):
        super().__init__(prefix="")
        self.node = name

    def parameter(self, role: str, shape: tuple[int, ...], init: str | None = None, **attributes: object):
        """The parameter `<node>_<role>`; weight decay acts on weights and gammas alone, as in MXNet's Module."""
        decayed = role in ("weight", "gamma")
        return self.params.get(f"{self.node}_{role}", shape=shape, init=init, wd_mult=float(decayed), **attributes)


class Conv(NamedBlock):
    """2-d convolution (cross-correlation); weight (filters, channels / groups, kh, kw)."""

    def __init__(
        self,
        name: str,
        channels: int,
        filters: int,
        options: NetworkOptions,
        *,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        pad: tuple[int, int] = (0, 0),
        groups: int = 1,
        bias: bool = False,
    ):
        super().__init__(name)
        self._attributes = {
            "num_filter": filters,
            "kernel": kernel,
            "stride": (stride, stride),
            "pad": pad,
            "num_group": groups,
            "no_bias": not bias,
            "workspace": options.workspace,
        }
        self.weight = self.parameter("weight", (filters, channels // groups, *kernel))
        if bias:
            self.bias = self.parameter("bias", (filters,), "zeros")

    def hybrid_forward(self, F, x, **weights):
        return F.Convolution(x, name=self.node, **weights, **self._attributes)


class BatchNorm(NamedBlock):
    """BatchNorm over the channels with the statistics `moving_mean` and `moving_var`."""

    def __init__(self, name: str, channels: int, options: NetworkOptions, *, fix_gamma: bool = False):
        super().__init__(name)
        self._attributes = {"fix_gamma": fix_gamma, "eps": BATCH_NORM_EPS, "momentum": options.bn_mom}
        # A fixed gamma keeps its gradient, which is 0, so that weight decay acts on it as it does in Module.
        self.gamma = self.parameter("gamma", (channels,), "ones")
        self.beta = self.parameter("beta", (channels,), "zeros")
        self.moving_mean = self.parameter("moving_mean", (channels,), "zeros", differentiable=False)
        self.moving_var = self.parameter("moving_var", (channels,), "ones", differentiable=False)

    def hybrid_forward(self, F, x, **arrays):
        return F.BatchNorm(x, name=self.node, **arrays, **self._attributes)


class Dense(NamedBlock):
    """Fully connected layer with bias: (N, channels) -> (N, units)."""

    def __init__(self, name: str, channels: int, units: int):
        super().__init__(name)
        self._units = units
        self.weight = self.parameter("weight", (units, channels))
        self.bias = self.parameter("bias", (units,), "zeros")

    def hybrid_forward(self, F, x, **weights):
        return F.FullyConnected(x, name=self.node, num_hidden=self._units, **weights)


class Activation(NamedBlock):
    """An activation by MXNet's name for it: "relu", "sigmoid"."""

    def __init__(self, name: str, kind: str):
        super().__init__(name)
        self._kind = kind

    def hybrid_forward(self, F, x):
        return F.Activation(x, act_type=self._kind, name=self.node)


def relu(name: str) -> Activation:
    return Activation(name, "relu")


class Pool(NamedBlock):
    """Pooling over 3 x 3 windows: "max" at stride 2, "avg" at stride 1 with padding counted as zeros."""

    def __init__(self, name: str, kind: str, *, pad: int = 0):
        super().__init__(name)
        stride, pad = (1, 1) if kind == "avg" else (2, pad)
        self._attributes = {"pool_type": kind, "stride": (stride, stride), "pad": (pad, pad)}

    def hybrid_forward(self, F, x):
        return F.Pooling(x, kernel=(3, 3), name=self.node, **self._attributes)


class GlobalAverage(NamedBlock):
    """Mean over the positions: (N, C, H, W) -> (N, C), in the operators of the declared graphs."""

    def hybrid_forward(self, F, x):
        pooled = F.Pooling(x, global_pool=True, kernel=(7, 7), pool_type="avg", name=self.node)
        return F.Flatten(pooled, name=f"{self.node}_flatten")


class ScaleChannels(NamedBlock):
    """Multiply every channel of x by its number in `scale`, (N, channels)."""

    def __init__(self, name: str, channels: int):
        super().__init__(name)
        self._channels = channels

    def hybrid_forward(self, F, x, scale):
        columns = F.Reshape(scale, shape=(-1, self._channels, 1, 1), name=f"{self.node}_reshape")
        return F.broadcast_mul(x, columns, name=self.node)


class Dropout(NamedBlock):
    """Zero elements with `probability` in training; no node at all for 0."""

    def __init__(self, name: str, probability: float):
        super().__init__(name)
        self._probability = probability

    def hybrid_forward(self, F, x):
        return F.Dropout(x, p=self._probability, name=self.node) if self._probability > 0 else x


class Add(NamedBlock):
    """Sum of two arrays of one shape."""

    def hybrid_forward(self, F, left, right):
        return F.elemwise_add(left, right, name=self.node)


class Multiply(NamedBlock):
    """Multiply by a constant."""

    def __init__(self, name: str, factor: float):
        super().__init__(name)
        self._factor = factor

    def hybrid_forward(self, F, x):
        return F._internal._mul_scalar(x, scalar=self._factor, name=self.node)
