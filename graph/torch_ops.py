"""MXNet's operators in PyTorch: one function per op, registered under MXNet's names.

An op function gets the call (the node's typed attributes) and the inputs, and returns the output, or a tuple of
them. It is written as ordinary PyTorch code, but its inputs are `torch.fx.Proxy` objects, so running it once writes
the op into an fx graph. It reads every attribute that it supports, with MXNet's default; attributes that remain
unread are refused, so a graph is either translated faithfully or not at all. Rules and their sources: shapes and
windows from MXNet 1.9.1's operator documentation, checked against MXNet by tests/test_torch_ops.py.

What depends on training or inference lives in small modules (BatchNorm, Dropout, SoftmaxOutput); parameters are
passed to them, never held, so that they keep MXNet's names and sharing.
"""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from errors import ProjectError
from graph.shapes import Shape, decode_reshape, reshape_codes
from graph.symbol_json import Attributes, Node


class Call(Attributes):
    """One node while it is translated: its attributes, and where modules and functions of ours are entered."""

    def __init__(self, node: Node, graph: fx.Graph, root: nn.Module, tracer: fx.proxy.TracerBase):
        super().__init__(node)
        self._graph, self._root, self._tracer = graph, root, tracer

    def function(self, target: Callable, *args, **kwargs) -> fx.Proxy:
        """Enter a call of `target` without tracing into it."""
        return self._tracer.create_proxy("call_function", target, args, kwargs)

    def module(self, module: nn.Module, *args) -> fx.Proxy:
        """Enter a call of a module that belongs to this node alone."""
        name = unique_attribute(self._root, self.node.name)
        self._root.add_module(name, module)
        return self._tracer.create_proxy("call_module", name, args, {})


@dataclass(frozen=True)
class Op:
    """How one MXNet op is translated."""

    translate: Callable

    def check_inputs(self, call: Call, count: int) -> None:
        """Raise when the op does not take `count` inputs."""
        try:
            inspect.signature(self.translate).bind(call, *range(count))
        except TypeError:
            raise call.error(f"takes another number of inputs than {count}") from None


OPS: dict[str, Op] = {}


def op(*names: str):
    """Register a function under MXNet's names of an op, old ones included."""

    def register(function: Callable) -> Callable:
        OPS.update((name, Op(function)) for name in names)
        return function

    return register


def unique_attribute(root: nn.Module, name: str) -> str:
    """`name` as a Python identifier that `root` does not have yet."""
    base = "".join(character if character.isalnum() or character == "_" else "_" for character in name)
    base = base if base[:1].isalpha() or base[:1] == "_" else f"_{base}"
    candidate, count = base, 0
    while keyword.iskeyword(candidate) or hasattr(root, candidate) or hasattr(fx.GraphModule, candidate):
        count += 1
        candidate = f"{base}_{count}"
    return candidate


def shape_of(value: fx.Proxy) -> Shape:
    """Shape of a value for the input shapes that the graph was translated with; only its rank is general."""
    return value.node.meta["shape"]


# ---------------------------------------------------------------------------------------------------------------
# Convolution and fully connected layers


def _spatial(call: Attributes, key: str, rank: int, default: int) -> tuple[int, ...]:
    values = call.integers(key, (default,) * rank)
    if len(values) != rank:
        raise call.error(f"attribute {key!r} has {len(values)} numbers, the kernel has {rank}")
    return values


def _check_layout(call: Attributes) -> None:
    call.choice("layout", ("None", "NCW", "NCHW", "NCDHW", None), None)


CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


@op("Convolution", "Convolution_v1")
def convolution(call, data, weight, bias=None):
    kernel = call.integers("kernel")
    if not 1 <= len(kernel) <= 3:
        raise call.error(f"kernel {kernel} is not supported (1 to 3 dimensions)")
    rank = len(kernel)
    stride, pad, dilate = (_spatial(call, *item) for item in _geometry(rank))
    groups = call.integer("num_group", 1)
    call.integer("num_filter")
    _check_layout(call)
    _check_bias(call, bias, default=False)
    call.ignore("workspace", "cudnn_tune", "cudnn_off")
    return CONVOLUTIONS[rank](data, weight, bias, stride, pad, dilate, groups)


def _geometry(rank: int):
    return ("stride", rank, 1), ("pad", rank, 0), ("dilate", rank, 1)


def _check_bias(call: Attributes, bias, default: bool) -> None:
    if call.boolean("no_bias", default) != (bias is None):
        raise call.error("no_bias contradicts the number of inputs")


TRANSPOSED_CONVOLUTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@op("Deconvolution")
def deconvolution(call, data, weight, bias=None):
    kernel = call.integers("kernel")
    rank = len(kernel)
    if not 1 <= rank <= 3:
        raise call.error(f"kernel {kernel} is not supported (1 to 3 dimensions)")
    stride, pad, dilate = (_spatial(call, *item) for item in _geometry(rank))
    adjust = _spatial(call, "adj", rank, 0)
    target = call.integers("target_shape", None)
    groups = call.integer("num_group", 1)
    call.integer("num_filter")
    _check_layout(call)
    _check_bias(call, bias, default=True)
    call.ignore("workspace", "cudnn_tune", "cudnn_off")
    if target is not None:
        return call.function(deconvolution_to, data, weight, bias, stride, target, groups, dilate)
    return TRANSPOSED_CONVOLUTIONS[rank](data, weight, bias, stride, pad, adjust, groups, dilate)


def deconvolution_to(data, weight, bias, stride, target, groups, dilate) -> Tensor:
    """Transposed convolution whose padding follows from the wanted output size; an odd rest is cut at the end."""
    sizes = zip(data.shape[2:], weight.shape[2:], stride, target, dilate)
    excess = [s * (size - 1) + d * (k - 1) + 1 - wanted for size, k, s, wanted, d in sizes]
    pad, adjust = [(e + 1) // 2 for e in excess], [e % 2 for e in excess]
    return TRANSPOSED_CONVOLUTIONS[len(stride)](data, weight, bias, stride, pad, adjust, groups, dilate)


@op("FullyConnected")
def fully_connected(call, data, weight, bias=None):
    call.integer("num_hidden")
    _check_bias(call, bias, default=False)
    if call.boolean("flatten", True) and len(shape_of(data)) > 2:
        data = data.flatten(1)
    return F.linear(data, weight, bias)


# ---------------------------------------------------------------------------------------------------------------
# Normalisation


class BatchNorm(nn.Module):
    """MXNet's BatchNorm; gamma, beta and the moving statistics come as inputs.

    In training the moving statistics move by `new = momentum * old + (1 - momentum) * batch`, the variance being the
    biased one, while PyTorch's kernel stores the unbiased one; the kernel therefore updates a rescaled copy.
    `frozen` stops the update, for a forward pass that only repeats an earlier one.
    """

    def __init__(self, eps: float, momentum: float, fix_gamma: bool, use_global_stats: bool, axis: int):
        super().__init__()
        self.eps, self.momentum, self.axis = eps, momentum, axis
        self.fix_gamma, self.use_global_stats = fix_gamma, use_global_stats
        self.frozen = False

    def forward(self, data: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if self.fix_gamma:
            # Without a gamma PyTorch's GPU kernels return no gradient for beta either.
            gamma = torch.ones_like(gamma) if data.is_cuda else None
        if self.axis != 1:
            data = data.movedim(self.axis, 1)
        if self.training and not self.use_global_stats:
            output = self._train(data, gamma, beta, mean, variance)
        else:
            output = self._normalise(data, gamma, beta, mean, variance, False, 0.0)
        return output if self.axis == 1 else output.movedim(1, self.axis)

    def _normalise(self, data, gamma, beta, mean, variance, training: bool, rate: float) -> Tensor:
        # A fixed gamma often stands before raw pixels. NVIDIA warns that cuDNN's sums over interleaved channels may
        # overflow for some ranges (CUDNN_BATCHNORM_SPATIAL_PERSISTENT); PyTorch's own add in float32.
        cudnn = torch.backends.cudnn.enabled and not self.fix_gamma
        return torch.batch_norm(data, gamma, beta, mean, variance, training, rate, self.eps, cudnn)

    def _train(self, data, gamma, beta, mean, variance) -> Tensor:
        count = data.numel() // data.shape[1]
        if count == 1:  # no unbiased variance to convert from; the biased one is zero
            output = self._normalise(data, gamma, beta, None, None, True, 0.0)
            if not self.frozen:
                with torch.no_grad():
                    mean.lerp_(data.flatten(1)[0].to(mean.dtype), 1 - self.momentum)
                    variance.mul_(self.momentum)
            return output
        unbiased = variance * (count / (count - 1))
        # A repeated pass must record the same kinds of tensors as the first, so it moves a copy.
        mean = mean.clone() if self.frozen else mean
        output = self._normalise(data, gamma, beta, mean, unbiased, True, 1 - self.momentum)
        if not self.frozen:
            torch.mul(unbiased, (count - 1) / count, out=variance)
        return output

    def extra_repr(self) -> str:
        flags = "".join(f", {key}" for key in ("fix_gamma", "use_global_stats") if getattr(self, key))
        return f"eps={self.eps}, momentum={self.momentum}{flags}"


@op("BatchNorm")
def batch_norm(call, data, gamma, beta, moving_mean, moving_var):
    axis = call.integer("axis", 1)
    module = BatchNorm(
        eps=call.number("eps", 1e-3),
        momentum=call.number("momentum", 0.9),
        fix_gamma=call.boolean("fix_gamma", True),
        use_global_stats=call.boolean("use_global_stats", False),
        axis=axis if axis >= 0 else axis + len(shape_of(data)),
    )
    if call.boolean("output_mean_var", False):
        raise call.error("output_mean_var=True is not supported")
    call.ignore("cudnn_off", "min_calib_range", "max_calib_range")
    return call.module(module, data, gamma, beta, moving_mean, moving_var)


@op("LRN")
def local_response_norm(call, data):
    size = call.integer("nsize")
    alpha, beta, knorm = call.number("alpha", 1e-4), call.number("beta", 0.75), call.number("knorm", 2.0)
    if size % 2 == 0:
        raise call.error(f"nsize={size} is not supported (odd sizes only, as in MXNet)")
    return F.local_response_norm(data, size, alpha, beta, knorm)


# ---------------------------------------------------------------------------------------------------------------
# Activations


ACTIVATIONS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softrelu": F.softplus,
    "softsign": F.softsign,
}


@op("Activation")
def activation(call, data):
    return ACTIVATIONS[call.choice("act_type", tuple(ACTIVATIONS))](data)


class InferenceOnly(nn.Module):
    """An activation whose training is broken in MXNet 1.9.1, so that there is nothing to agree with."""

    def __init__(self, function: Callable[[Tensor], Tensor], problem: str):
        super().__init__()
        self.function, self.problem = function, problem

    def forward(self, data: Tensor) -> Tensor:
        if self.training:
            raise ProjectError(self.problem)
        return self.function(data)


@op("LeakyReLU")
def leaky_relu(call, data, gamma=None):
    kind = call.choice("act_type", ("leaky", "elu", "selu", "gelu", "prelu", "rrelu"), "leaky")
    slope = call.number("slope", 0.25)
    low, high = call.number("lower_bound", 0.125), call.number("upper_bound", 0.334)
    if (gamma is not None) != (kind == "prelu"):
        raise call.error(f"act_type={kind} contradicts the number of inputs")
    if kind == "leaky":
        return F.leaky_relu(data, slope)
    if kind == "elu":
        return F.elu(data, slope)
    if kind == "gelu":
        return F.gelu(data)
    if kind == "prelu":
        return F.prelu(data, gamma)
    function = {"selu": F.selu, "rrelu": _LeakySlope((low + high) / 2)}[kind]
    problem = f"node {call.node.name!r}: training through LeakyReLU act_type={kind} is broken in MXNet, so refused"
    return call.module(InferenceOnly(function, problem), data)


@dataclass(frozen=True)
class _LeakySlope:
    slope: float

    def __call__(self, data: Tensor) -> Tensor:
        return F.leaky_relu(data, self.slope)


def _unary(function: Callable) -> Callable:
    return lambda call, data: function(data)


UNARY = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softsign": F.softsign,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "abs": torch.abs,
    "negative": torch.neg,
    "reciprocal": torch.reciprocal,
    "erf": torch.erf,
    "ones_like": torch.ones_like,
    "zeros_like": torch.zeros_like,
}
for _name, _function in UNARY.items():
    op(_name)(_unary(_function))


@op("clip")
def clip(call, data):
    return torch.clamp(data, call.number("a_min"), call.number("a_max"))


@op("softmax")
def softmax(call, data):
    return torch.softmax(_tempered(call, data), call.integer("axis", -1))


@op("log_softmax")
def log_softmax(call, data):
    return torch.log_softmax(_tempered(call, data), call.integer("axis", -1))


def _tempered(call, data):
    if call.boolean("use_length", False):
        raise call.error("use_length=True is not supported")
    call.choice("dtype", ("None", None), None)
    temperature = call.number("temperature", None)
    return data if temperature is None else data / temperature


@op("SoftmaxActivation")
def softmax_activation(call, data):
    # "instance" is documented as a softmax over everything but the first axis; MXNet computes it over the last.
    channel = call.choice("mode", ("instance", "channel"), "instance") == "channel"
    return torch.softmax(data, 1 if channel else -1)


class Dropout(nn.Module):
    """Zero with probability p and scale the rest by 1 / (1 - p), in training or always."""

    def __init__(self, p: float, always: bool):
        super().__init__()
        self.p, self.always = p, always

    def forward(self, data: Tensor) -> Tensor:
        return F.dropout(data, self.p, self.training or self.always)

    def extra_repr(self) -> str:
        return f"p={self.p}, always={self.always}"


@op("Dropout")
def dropout(call, data):
    if call.integers("axes", ()):
        raise call.error("axes is not supported")
    call.ignore("cudnn_off")
    always = call.choice("mode", ("training", "always"), "training") == "always"
    return call.module(Dropout(call.number("p", 0.5), always), data)


# ---------------------------------------------------------------------------------------------------------------
# Pooling and resizing


MAX_POOLS = {1: torch.max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
GLOBAL_MAX_POOLS = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


@op("Pooling")
def pooling(call, data):
    kind = call.choice("pool_type", ("max", "avg", "sum"), "max")
    kernel = call.integers("kernel", (1,) * (len(shape_of(data)) - 2))
    rank = len(kernel)
    if rank != len(shape_of(data)) - 2 or rank not in MAX_POOLS:
        raise call.error(f"kernel {kernel} does not fit data of shape {shape_of(data)}")
    stride, pad = _spatial(call, "stride", rank, 1), _spatial(call, "pad", rank, 0)
    full = call.choice("pooling_convention", ("valid", "full"), "valid") == "full"
    include_pad = call.boolean("count_include_pad", True)
    _check_layout(call)
    call.ignore("cudnn_off", "p_value")
    if call.boolean("global_pool", False):
        return _global_pool(call, kind, data, rank)
    if any(p > k // 2 for p, k in zip(pad, kernel)):
        raise call.error(f"pad {pad} beyond half of the kernel {kernel} is not supported")
    if kind == "sum" and rank == 1:
        raise call.error("pool_type=sum in one dimension is not supported")
    if full:
        return call.function(full_pool, kind, data, kernel, stride, pad, include_pad)
    if kind == "max":
        return MAX_POOLS[rank](data, kernel, stride, pad)
    options = {"divisor_override": 1} if kind == "sum" else {}
    return AVERAGE_POOLS[rank](data, kernel, stride, pad, False, include_pad, **options)


def _global_pool(call: Call, kind: str, data, rank: int):
    axes = tuple(range(2, 2 + rank))
    if kind == "max":
        return GLOBAL_MAX_POOLS[rank](data, 1)
    return call.function(mean_over, data, axes, True) if kind == "avg" else torch.sum(data, axes, True)


def mean_over(data: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """torch.mean, whose gradient is one number for all positions instead of an array as large as `data`."""
    # On GPUs autocast would make the sum float32, and converting its gradient back needs that array. In bfloat16 the
    # result reaches as far as in float32, and the kernel adds in float32 all the same.
    dtype = torch.bfloat16 if data.dtype == torch.bfloat16 else None
    return torch.sum(data, axes, keepdims, dtype=dtype) / math.prod(data.shape[axis] for axis in axes)


def full_pool(kind: str, data: Tensor, kernel, stride, pad, include_pad: bool) -> Tensor:
    """Pooling under the convention "full", whose windows reach over the end: 1 + ceil((size + 2 pad - k) / stride).

    PyTorch's ceil_mode leaves out a last window that begins in the padding. Such windows hold nothing: the
    lowest number for max, zero for averages and sums.
    """
    rank = len(kernel)
    if kind == "max":
        output = MAX_POOLS[rank](data, kernel, stride, pad, 1, True)
    else:
        options = {"divisor_override": 1} if kind == "sum" else {}
        output = AVERAGE_POOLS[rank](data, kernel, stride, pad, True, include_pad, **options)
    missing = []
    for size, have, k, s, p in zip(data.shape[2:], output.shape[2:], kernel, stride, pad):
        missing = [0, 1 - (k - size - 2 * p) // s - have, *missing]
    if not any(missing):
        return output
    return F.pad(output, missing, value=torch.finfo(output.dtype).min if kind == "max" else 0.0)


@op("_contrib_AdaptiveAvgPooling2D")
def adaptive_average_pooling(call, data):
    size = call.integers("output_size", (1,))
    size = size * 2 if len(size) == 1 else size
    return call.function(mean_over, data, (2, 3), True) if size == (1, 1) else F.adaptive_avg_pool2d(data, size)


@op("UpSampling")
def up_sampling(call, data):
    call.choice("sample_type", ("nearest",))
    call.choice("num_args", ("1",), "1")
    call.ignore("workspace", "num_filter", "multi_input_mode")
    return F.interpolate(data, scale_factor=call.integer("scale"), mode="nearest")


@op("_contrib_BilinearResize2D")
def bilinear_resize(call, data):
    call.choice("mode", ("size",), "size")
    size = call.integer("height"), call.integer("width")
    return F.interpolate(data, size=size, mode="bilinear", align_corners=call.boolean("align_corners", True))


@op("Pad", "pad")
def pad(call, data):
    width = call.integers("pad_width")
    mode = call.choice("mode", ("constant", "edge", "reflect"))
    value = call.number("constant_value", 0.0)
    if len(width) != 2 * len(shape_of(data)):
        raise call.error(f"pad_width {width} does not fit data of shape {shape_of(data)}")
    if any(width[:4]):
        raise call.error("padding of the first two axes is not supported")
    pairs = [width[i : i + 2] for i in range(4, len(width), 2)]
    backwards = [number for pair in reversed(pairs) for number in pair]
    if mode == "constant":
        return F.pad(data, backwards, "constant", value)
    return F.pad(data, backwards, {"edge": "replicate", "reflect": "reflect"}[mode])


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


def _elementwise(function: Callable) -> Callable:
    def translate(call, left, right):
        if shape_of(left) != shape_of(right):
            raise call.error(f"shapes {shape_of(left)} and {shape_of(right)} differ")
        output = function(left, right)
        output.node.meta["same_shape"] = True  # for any batch size, so either input may be overwritten
        return output

    return translate


def _broadcast(function: Callable) -> Callable:
    return lambda call, left, right: function(left, right)


for _name, _aliases in {
    "add": ("elemwise_add", "_add", "_plus", "_Plus"),
    "sub": ("elemwise_sub", "_sub", "_minus", "_Minus"),
    "mul": ("elemwise_mul", "_mul", "_Mul"),
    "div": ("elemwise_div", "_div", "_Div"),
    "maximum": ("_maximum", "_Maximum"),
    "minimum": ("_minimum", "_Minimum"),
}.items():
    op(*_aliases)(_elementwise(BINARY[_name]))

for _name, _aliases in {
    "add": ("broadcast_add", "broadcast_plus"),
    "sub": ("broadcast_sub", "broadcast_minus"),
    "mul": ("broadcast_mul",),
    "div": ("broadcast_div",),
    "maximum": ("broadcast_maximum",),
    "minimum": ("broadcast_minimum",),
}.items():
    op(*_aliases)(_broadcast(BINARY[_name]))

SCALAR = {
    ("_plus_scalar", "_PlusScalar"): lambda data, scalar: data + scalar,
    ("_minus_scalar", "_MinusScalar"): lambda data, scalar: data - scalar,
    ("_rminus_scalar", "_RMinusScalar"): lambda data, scalar: scalar - data,
    ("_mul_scalar", "_MulScalar"): lambda data, scalar: data * scalar,
    ("_div_scalar", "_DivScalar"): lambda data, scalar: data / scalar,
    ("_rdiv_scalar", "_RDivScalar"): lambda data, scalar: scalar / data,
    ("_power_scalar", "_PowerScalar"): lambda data, scalar: data**scalar,
    ("_maximum_scalar", "_MaximumScalar"): lambda data, scalar: torch.clamp(data, min=scalar),
    ("_minimum_scalar", "_MinimumScalar"): lambda data, scalar: torch.clamp(data, max=scalar),
}


def _scalar(function: Callable) -> Callable:
    def translate(call, data):
        call.ignore("is_int")
        return function(data, call.number("scalar"))

    return translate


for _aliases, _function in SCALAR.items():
    op(*_aliases)(_scalar(_function))


@op("add_n", "ElementWiseSum")
def add_n(call, *parts):
    call.ignore("num_args")
    total = parts[0]
    for part in parts[1:]:
        total = torch.add(total, part)
    return total


def _reduction(function: Callable) -> Callable:
    def translate(call, data):
        rank = len(shape_of(data))
        axes = call.integers("axis", None)
        keep, exclude = call.boolean("keepdims", False), call.boolean("exclude", False)
        chosen = tuple(range(rank)) if axes is None else tuple(axis % rank for axis in axes)
        if exclude:
            chosen = () if axes is None else tuple(axis for axis in range(rank) if axis not in chosen)
        if not chosen:
            raise call.error("a reduction over no axis is not supported")
        output = call.function(function, data, chosen, keep)
        return output if keep or len(chosen) < rank else output.reshape(1)  # MXNet has no arrays without axes

    return translate


op("mean")(_reduction(mean_over))
op("sum", "sum_axis")(_reduction(torch.sum))


@op("dot")
def dot(call, left, right):
    call.choice("forward_stype", ("None", "default", None), None)
    if call.boolean("transpose_a", False):
        left = left.permute(*reversed(range(len(shape_of(left)))))
    if call.boolean("transpose_b", False):
        right = right.permute(*reversed(range(len(shape_of(right)))))
    return torch.tensordot(left, right, 1)


@op("batch_dot")
def batch_dot(call, left, right):
    call.choice("forward_stype", ("None", "default", None), None)
    left = left.transpose(1, 2) if call.boolean("transpose_a", False) else left
    right = right.transpose(1, 2) if call.boolean("transpose_b", False) else right
    return torch.bmm(left, right)


# ---------------------------------------------------------------------------------------------------------------
# Shapes


@op("Flatten", "flatten")
def flatten(call, data):
    return data.flatten(1)


@op("Reshape", "reshape")
def reshape(call, data):
    codes, reverse = reshape_codes(call)
    if all(code == 0 for code in codes) and len(codes) == len(shape_of(data)):
        return data
    if codes == (0, -1):
        return data.flatten(1)
    if all(code > 0 or code == -1 for code in codes):
        return data.reshape(codes)
    try:
        decode_reshape(shape_of(data), codes, reverse)
    except (ValueError, IndexError, ZeroDivisionError):
        raise call.error(f"shape {codes} does not fit data of shape {shape_of(data)}") from None
    return call.function(reshape_coded, data, codes, reverse)


def reshape_coded(data: Tensor, codes: tuple[int, ...], reverse: bool) -> Tensor:
    """Reshape by MXNet's codes, see `graph.shapes.decode_reshape`."""
    return data.reshape(decode_reshape(data.shape, codes, reverse))


@op("reshape_like")
def reshape_like(call, data, like):
    return data.reshape(like.shape)


@op("expand_dims")
def expand_dims(call, data):
    return data.unsqueeze(call.integer("axis"))


@op("squeeze")
def squeeze(call, data):
    axes = call.integers("axis", None)
    return data.squeeze() if axes is None else data.squeeze(axes)


@op("transpose")
def transpose(call, data):
    axes = call.integers("axes", tuple(reversed(range(len(shape_of(data))))))
    return data.permute(*axes)


@op("SwapAxis", "swapaxes")
def swap_axes(call, data):
    return data.transpose(call.integer("dim1", 0), call.integer("dim2", 0))


@op("Concat", "concat")
def concat(call, *parts):
    call.ignore("num_args")
    return torch.cat(parts, call.integer("dim", 1))


@op("stack")
def stack(call, *parts):
    call.ignore("num_args")
    return torch.stack(parts, call.integer("axis", 0))


@op("SliceChannel", "split")
def slice_channel(call, data):
    axis, count = call.integer("axis", 1), call.integer("num_outputs")
    size = shape_of(data)[axis]
    if size % count:
        raise call.error(f"{size} elements do not split into {count} equal parts")
    if call.boolean("squeeze_axis", False):
        if size != count:
            raise call.error(f"squeeze_axis needs parts of one element, not {size // count}")
        parts = torch.unbind(data, axis)
    else:
        parts = torch.chunk(data, count, axis)
    return tuple(parts[index] for index in range(count))


def _slices(call: Call, begin, end, step) -> tuple[slice, ...]:
    if any(number is not None and number <= 0 for number in step):
        raise call.error(f"step {step} is not supported (positive steps only)")
    return tuple(slice(*numbers) for numbers in zip(begin, end, step))


@op("slice", "crop")
def slice_axes(call, data):
    begin, end = call.integers("begin"), call.integers("end")
    step = call.integers("step", (None,) * len(begin))
    return data[_slices(call, begin, end, step)]


@op("slice_axis")
def slice_axis(call, data):
    axis = call.integer("axis") % len(shape_of(data))
    window = slice(call.integer("begin"), call.integer("end", None))
    return data[(slice(None),) * axis + (window,)]


@op("slice_like")
def slice_like(call, data, like):
    axes = call.integers("axes", tuple(range(len(shape_of(data)))))
    chosen = {axis % len(shape_of(data)) for axis in axes}
    return data[tuple(slice(like.shape[a]) if a in chosen else slice(None) for a in range(max(chosen) + 1))]


@op("broadcast_to")
def broadcast_to(call, data):
    return data.expand(*(-1 if size == 0 else size for size in call.integers("shape")))


@op("broadcast_axis", "broadcast_axes")
def broadcast_axis(call, data):
    sizes = [-1] * len(shape_of(data))
    for axis, size in zip(call.integers("axis"), call.integers("size")):
        sizes[axis] = size
    return data.expand(*sizes)


@op("broadcast_like")
def broadcast_like(call, data, like):
    return data.expand(like.shape)


DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}


@op("Cast", "cast")
def cast(call, data):
    return data.to(DTYPES[call.choice("dtype", tuple(DTYPES))])


@op("_copy", "identity")
def copy(call, data):
    return data


@op("BlockGrad", "stop_gradient")
def block_grad(call, data):
    return data.detach()


# ---------------------------------------------------------------------------------------------------------------
# Losses: their backward ignores the gradient that comes from outside


class SoftmaxOutput(nn.Module):
    """Softmax whose gradient is that of a cross entropy with the label, whatever follows it.

    `factor`, when set, is a 0-d tensor that multiplies the gradient: the scale that keeps float16 gradients from
    underflowing has to enter here, since the head gradient is ignored.
    """

    def __init__(self, options: SoftmaxOptions):
        super().__init__()
        self.options = options
        self.factor: Tensor | None = None

    def forward(self, data: Tensor, label: Tensor | None = None) -> Tensor:
        data = data if data.dtype == torch.float64 else data.float()
        if label is None or not self.training:
            return self.options.probabilities(data)
        return SoftmaxCrossEntropy.apply(data, label, self.options, self.factor)

    def extra_repr(self) -> str:
        return str(self.options)


@dataclass(frozen=True)
class SoftmaxOptions:
    """The modes of SoftmaxOutput."""

    multi_output: bool
    preserve_shape: bool
    use_ignore: bool
    ignore_label: float
    normalization: str
    smooth_alpha: float
    grad_scale: float

    def probabilities(self, data: Tensor) -> Tensor:
        if self.multi_output:
            return torch.softmax(data, 1)
        if self.preserve_shape:
            return torch.softmax(data, -1)
        return torch.softmax(data.reshape(data.shape[0], -1), 1).reshape(data.shape)

    def gradient(self, output: Tensor, label: Tensor) -> Tensor:
        """Of the scaled cross entropy with respect to the logits, same shape as `output`."""
        if label.shape == output.shape:
            return (output - label) * self.grad_scale
        if self.multi_output:  # (N, K, rest) against (N, rest)
            rows = output.flatten(2) if output.dim() > 2 else output.unsqueeze(2)
        elif self.preserve_shape:  # every position of the leading axes is a row
            rows = output.reshape(-1, output.shape[-1], 1)
        else:
            rows = output.reshape(output.shape[0], -1, 1)
        label = label.reshape(rows.shape[0], 1, rows.shape[2])
        classes = rows.shape[1]
        target = torch.arange(classes, device=rows.device).view(1, -1, 1) == label
        if self.smooth_alpha and not self.multi_output:  # MXNet smooths no labels of multi_output
            low = self.smooth_alpha / (classes - 1)
            target = torch.where(target, 1 - self.smooth_alpha, low)
        gradient = rows - target.to(rows.dtype)
        if self.use_ignore:
            gradient = gradient * (label != self.ignore_label)
        return (gradient * self._scale(label, rows)).reshape(output.shape)

    def _scale(self, label: Tensor, rows: Tensor) -> float | Tensor:
        scale = self.grad_scale
        if self.normalization == "valid":
            return scale / (label != self.ignore_label).sum().clamp(min=1)
        if self.multi_output:
            scale /= rows.shape[2]
        return scale / label.shape[0] if self.normalization == "batch" else scale


class SoftmaxCrossEntropy(torch.autograd.Function):
    """Forward: probabilities. Backward: `SoftmaxOptions.gradient`, the incoming gradient ignored."""

    @staticmethod
    def forward(ctx, data: Tensor, label: Tensor, options: SoftmaxOptions, factor: Tensor | None) -> Tensor:
        output = options.probabilities(data)
        ctx.save_for_backward(output, label)
        ctx.options, ctx.factor = options, factor
        return output

    @staticmethod
    def backward(ctx, head: Tensor):
        output, label = ctx.saved_tensors
        gradient = ctx.options.gradient(output, label)
        return gradient if ctx.factor is None else gradient * ctx.factor, None, None, None


@op("SoftmaxOutput", "Softmax")
def softmax_output(call, data, label):
    options = SoftmaxOptions(
        multi_output=call.boolean("multi_output", False),
        preserve_shape=call.boolean("preserve_shape", False),
        use_ignore=call.boolean("use_ignore", False),
        ignore_label=call.number("ignore_label", -1.0),
        normalization=call.choice("normalization", ("null", "batch", "valid"), "null"),
        smooth_alpha=call.number("smooth_alpha", 0.0),
        grad_scale=call.number("grad_scale", 1.0),
    )
    if call.boolean("out_grad", False):
        raise call.error("out_grad=True is not supported (broken in MXNet 1.9.1)")
    flat = len(shape_of(data)) == 2 or options.multi_output or options.preserve_shape
    if not flat and label.node.meta.get("shape") != shape_of(data):
        raise call.error(f"data of shape {shape_of(data)} needs multi_output or preserve_shape")
    return call.module(SoftmaxOutput(options), data, label)


class LossGradient(torch.autograd.Function):
    """Identity whose gradient is a constant."""

    @staticmethod
    def forward(ctx, data: Tensor, scale: float, normalization: str, threshold: float) -> Tensor:
        ctx.save_for_backward(data)
        ctx.options = scale, normalization, threshold
        return data.view_as(data)

    @staticmethod
    def backward(ctx, head: Tensor):
        (data,) = ctx.saved_tensors
        scale, normalization, threshold = ctx.options
        if normalization == "batch":
            scale = scale / data.shape[0]
        gradient = torch.full_like(data, scale)
        if normalization == "valid":
            gradient = gradient / (data > threshold).sum().clamp(min=1)
        return gradient, None, None, None


@op("MakeLoss")
def make_loss(call, data):
    normalization = call.choice("normalization", ("null", "batch", "valid"), "null")
    scale, threshold = call.number("grad_scale", 1.0), call.number("valid_thresh", 0.0)
    return call.function(constant_gradient, data, scale, normalization, threshold)


def constant_gradient(data: Tensor, scale: float, normalization: str, threshold: float) -> Tensor:
    """`data`, with the gradient of MakeLoss."""
    return LossGradient.apply(data, scale, normalization, threshold)
