"""Shapes of everything in a Symbol graph, from the shapes of its inputs, without any framework.

    shapes = infer(parse(text), {"data": (1, 3, 224, 224)})
    shapes.variables["fc1_weight"], shapes.outputs[Entry(12)]

One rule per op, `rule(attributes, *input shapes)` -> output shape, or a list of them; PARAMETERS says what an op's
first input implies for those after it, which may be parameters of unknown shape. Source of both: MXNet 1.9.1's
operator documentation; tests/test_shapes.py compares with MXNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Union

from graph.symbol_json import Attributes, Entry, Graph, GraphError, Node

Shape = tuple
OutputRule = Callable[..., Union[Shape, list]]
# (attributes, shape of the first input) -> shapes of the inputs after it
ParameterRule = Callable[[Attributes, Shape], Sequence[Shape]]

# Ops whose second input is a label, which only shapes the gradient.
LABELLED_OPS = ("SoftmaxOutput", "Softmax")

OUTPUTS: dict[str, OutputRule] = {}
PARAMETERS: dict[str, ParameterRule] = {}


@dataclass(frozen=True)
class Shapes:
    """variables: name -> shape of every argument and auxiliary state. outputs: shape of every visible output."""

    variables: Mapping[str, Shape]
    outputs: Mapping[Entry, Shape]


def infer(graph: Graph, inputs: Mapping[str, Shape]) -> Shapes:
    """Shapes of everything that the heads of `graph` need.

    inputs: at least the shape of the data; labels and parameters follow from it. Raises GraphError, naming the node,
    for an op without a rule and for shapes that do not fit.
    """
    unknown = [name for name in inputs if name not in graph.arguments]
    if unknown:
        raise GraphError(f"the graph has no input {unknown[0]!r}; its first argument is {graph.arguments[0]!r}")
    found: dict[Entry, Shape] = {}
    for index in graph.order:
        node = graph.nodes[index]
        if not node.is_variable:
            _infer_node(graph, index, node, found)
        elif node.name in inputs:
            found[Entry(index)] = tuple(inputs[node.name])
    names = {Entry(index): graph.nodes[index].name for index in graph.order if graph.nodes[index].is_variable}
    return Shapes({name: found[entry] for entry, name in names.items()}, found)


def parameter_shapes(graph: Graph, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of "arg:NAME" and "aux:NAME" in MXNet's order; `inputs` are no parameters, so all must be given."""
    shapes = infer(graph, inputs).variables
    found = {f"arg:{name}": shapes[name] for name in graph.arguments if name not in inputs}
    found.update({f"aux:{name}": shapes[name] for name in graph.auxiliary})
    return found


def _infer_node(graph: Graph, index: int, node: Node, found: dict[Entry, Shape]) -> None:
    """Add the shapes of the node's parameters and outputs to `found`."""
    call = Attributes(node)
    if node.op not in OUTPUTS:
        raise call.error("the op is not supported")
    known = [found.get(entry) for entry in node.inputs]
    try:
        if node.op in PARAMETERS and known and known[0] is not None:
            _infer_parameters(graph, call, found)
        for entry in node.inputs:
            if entry not in found:
                found[entry] = _declared(graph, call, entry)
        outputs = OUTPUTS[node.op](call, *(found[entry] for entry in node.inputs))
    except (IndexError, TypeError, ValueError, ZeroDivisionError):
        shapes = ", ".join(str(found.get(entry, "unknown")) for entry in node.inputs)
        raise call.error(f"does not fit inputs of shapes {shapes}") from None
    for position, shape in enumerate(outputs if isinstance(outputs, list) else [outputs]):
        if min(shape) < 1:
            raise call.error(f"nothing is left of its input: {found[node.inputs[0]]} becomes {shape}")
        found[Entry(index, position)] = tuple(shape)


def _infer_parameters(graph: Graph, call: Attributes, found: dict[Entry, Shape]) -> None:
    first, *rest = call.node.inputs
    data = found[first]
    for entry, shape in zip(rest, PARAMETERS[call.node.op](call, data)):
        if not graph.nodes[entry.node].is_variable:
            continue
        label = call.node.op in LABELLED_OPS and found.get(entry) == data  # probabilities in the place of classes
        if found.setdefault(entry, shape) != shape and not label:
            name = graph.nodes[entry.node].name
            raise call.error(f"{name!r} has the shape {found[entry]}, and {shape} is needed")


def _declared(graph: Graph, call: Attributes, entry: Entry) -> Shape:
    """The `__shape__` that Gluon writes on a variable, when it is complete."""
    variable = graph.nodes[entry.node]
    shape = Attributes(variable).integers("__shape__", None) if variable.is_variable else None
    if not shape or min(shape) < 1:
        raise call.error(f"the shape of {variable.name!r} cannot be inferred; give it as an input")
    return shape


def rule(*names: str, parameters: ParameterRule | None = None):
    """Register the rule of an op under MXNet's names of it, old ones included."""

    def register(function: OutputRule) -> OutputRule:
        OUTPUTS.update((name, function) for name in names)
        if parameters is not None:
            PARAMETERS.update((name, parameters) for name in names)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------
# Convolution and fully connected layers


def _geometry(call: Attributes, kernel: Shape) -> tuple[Shape, Shape, Shape]:
    """Stride, padding and dilation, one number for every dimension of the kernel."""
    rank = len(kernel)
    found = tuple(call.integers(key, (value,) * rank) for key, value in (("stride", 1), ("pad", 0), ("dilate", 1)))
    if any(len(numbers) != rank for numbers in found):
        raise call.error(f"stride, pad or dilate do not have the {rank} dimensions of the kernel")
    return found


def _windows(call: Attributes, data: Shape, kernel: Shape, stride: Shape, pad: Shape) -> Shape:
    """How many windows lie within each spatial axis."""
    if len(data) != len(kernel) + 2:
        raise ValueError
    if any(size + 2 * p < k for size, k, p in zip(data[2:], kernel, pad)):
        raise call.error(f"a window of {kernel} is larger than its input of {data[2:]} with the padding {pad}")
    return tuple(1 + (size + 2 * p - k) // s for size, k, s, p in zip(data[2:], kernel, stride, pad))


def _convolution_parameters(call: Attributes, data: Shape) -> Sequence[Shape]:
    filters, groups = call.integer("num_filter"), call.integer("num_group", 1)
    if data[1] % groups or filters % groups:
        raise call.error(f"{data[1]} channels and {filters} filters do not split into {groups} groups")
    return (filters, data[1] // groups, *call.integers("kernel")), (filters,)


@rule("Convolution", "Convolution_v1", parameters=_convolution_parameters)
def convolution(call, data, *parameters):
    kernel = call.integers("kernel")
    stride, pad, dilate = _geometry(call, kernel)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilate))
    return (data[0], call.integer("num_filter"), *_windows(call, data, reach, stride, pad))


def _deconvolution_parameters(call: Attributes, data: Shape) -> Sequence[Shape]:
    filters, groups = call.integer("num_filter"), call.integer("num_group", 1)
    return (data[1], filters // groups, *call.integers("kernel")), (filters,)


@rule("Deconvolution", parameters=_deconvolution_parameters)
def deconvolution(call, data, *parameters):
    kernel = call.integers("kernel")
    stride, pad, dilate = _geometry(call, kernel)
    adjust = call.integers("adj", (0,) * len(kernel))
    sizes = call.integers("target_shape", None) or tuple(
        s * (size - 1) + d * (k - 1) + 1 - 2 * p + a
        for size, k, s, p, d, a in zip(data[2:], kernel, stride, pad, dilate, adjust)
    )
    return (data[0], call.integer("num_filter"), *sizes)


def _dense_parameters(call: Attributes, data: Shape) -> Sequence[Shape]:
    units = call.integer("num_hidden")
    width = math.prod(data[1:]) if call.boolean("flatten", True) else data[-1]
    return (units, width), (units,)


@rule("FullyConnected", parameters=_dense_parameters)
def fully_connected(call, data, *parameters):
    units = call.integer("num_hidden")
    return (data[0], units) if call.boolean("flatten", True) else (*data[:-1], units)


# ---------------------------------------------------------------------------------------------------------------
# Ops whose output has the shape of their first input


def _batch_norm_parameters(call: Attributes, data: Shape) -> Sequence[Shape]:
    return ((data[call.integer("axis", 1)],),) * 4


def _slope_parameters(call: Attributes, data: Shape) -> Sequence[Shape]:
    return ((data[1],),)


def _label_parameters(call: Attributes, data: Shape) -> Sequence[Shape]:
    if call.boolean("multi_output", False):
        return ((data[0], *data[2:]),)
    return (data[:-1],) if call.boolean("preserve_shape", False) else ((data[0],),)


def _same(call: Attributes, data: Shape, *others: Shape) -> Shape:
    return data


rule("BatchNorm", parameters=_batch_norm_parameters)(_same)
rule("LeakyReLU", parameters=_slope_parameters)(_same)
rule(*LABELLED_OPS, parameters=_label_parameters)(_same)
# Activations, normalisations and losses
rule("Activation", "Dropout", "LRN", "MakeLoss", "SoftmaxActivation", "clip", "log_softmax", "softmax")(_same)
# Functions of one number
rule("abs", "erf", "exp", "log", "negative", "reciprocal", "relu", "rsqrt", "sigmoid", "softsign")(_same)
rule("sqrt", "square", "tanh", "ones_like", "zeros_like")(_same)
# Copies
rule("BlockGrad", "stop_gradient", "Cast", "cast", "_copy", "identity")(_same)
# Arithmetic with a constant
rule("_plus_scalar", "_PlusScalar", "_minus_scalar", "_MinusScalar", "_rminus_scalar", "_RMinusScalar")(_same)
rule("_mul_scalar", "_MulScalar", "_div_scalar", "_DivScalar", "_rdiv_scalar", "_RDivScalar")(_same)
rule("_power_scalar", "_PowerScalar", "_maximum_scalar", "_MaximumScalar", "_minimum_scalar", "_MinimumScalar")(_same)


# ---------------------------------------------------------------------------------------------------------------
# Pooling and resizing


@rule("Pooling")
def pooling(call, data):
    if call.boolean("global_pool", False):
        return (*data[:2], *(1 for _ in data[2:]))
    kernel = call.integers("kernel")
    stride, pad, _ = _geometry(call, kernel)
    valid = _windows(call, data, kernel, stride, pad)
    if call.choice("pooling_convention", ("valid", "full"), "valid") == "valid":
        return (*data[:2], *valid)
    rest = ((size + 2 * p - k) % s for size, k, s, p in zip(data[2:], kernel, stride, pad))
    return (*data[:2], *(count + (left > 0) for count, left in zip(valid, rest)))


@rule("_contrib_AdaptiveAvgPooling2D")
def adaptive_average_pooling(call, data):
    size = call.integers("output_size", (1,))
    return (*data[:2], *(size * 2 if len(size) == 1 else size))


@rule("UpSampling")
def up_sampling(call, data, *others):
    return (*data[:2], *(size * call.integer("scale") for size in data[2:]))


@rule("_contrib_BilinearResize2D")
def bilinear_resize(call, data):
    call.choice("mode", ("size",), "size")
    return (*data[:2], call.integer("height"), call.integer("width"))


@rule("Pad", "pad")
def pad(call, data):
    width = call.integers("pad_width")
    return tuple(size + width[2 * axis] + width[2 * axis + 1] for axis, size in enumerate(data))


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic of several inputs


@rule("elemwise_add", "_add", "_plus", "_Plus", "elemwise_sub", "_sub", "_minus", "_Minus")
@rule("elemwise_mul", "_mul", "_Mul", "elemwise_div", "_div", "_Div", "add_n", "ElementWiseSum")
@rule("_maximum", "_Maximum", "_minimum", "_Minimum")
def elementwise(call, data, *others):
    if any(other != data for other in others):
        raise ValueError
    return data


@rule("broadcast_add", "broadcast_plus", "broadcast_sub", "broadcast_minus", "broadcast_mul", "broadcast_div")
@rule("broadcast_maximum", "broadcast_minimum")
def broadcast(call, left, right):
    pairs = list(zip_longest(reversed(left), reversed(right), fillvalue=1))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError
    return tuple(a if b == 1 else b for a, b in reversed(pairs))


@rule("mean", "sum", "sum_axis")
def reduction(call, data):
    rank, axes = len(data), call.integers("axis", None)
    chosen = set(range(rank)) if axes is None else {_axis(axis, rank) for axis in axes}
    if call.boolean("exclude", False) and axes is not None:
        chosen = set(range(rank)) - chosen
    if call.boolean("keepdims", False):
        return tuple(1 if axis in chosen else size for axis, size in enumerate(data))
    return tuple(size for axis, size in enumerate(data) if axis not in chosen) or (1,)


@rule("dot")
def dot(call, left, right):
    left = left[::-1] if call.boolean("transpose_a", False) else left
    right = right[::-1] if call.boolean("transpose_b", False) else right
    if left[-1] != right[0]:
        raise ValueError
    return (*left[:-1], *right[1:]) or (1,)


@rule("batch_dot")
def batch_dot(call, left, right):
    batch, rows, inner = (left[0], left[2], left[1]) if call.boolean("transpose_a", False) else left
    other, depth, columns = (right[0], right[2], right[1]) if call.boolean("transpose_b", False) else right
    if batch != other or inner != depth:
        raise ValueError
    return (batch, rows, columns)


# ---------------------------------------------------------------------------------------------------------------
# Reshaping, joining and cutting


def _axis(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise IndexError(axis)
    return axis % rank


@rule("Flatten", "flatten")
def flatten(call, data):
    return (data[0], math.prod(data[1:]))


@rule("Reshape", "reshape")
def reshape(call, data):
    codes, reverse = reshape_codes(call)
    result = decode_reshape(data, codes, reverse)
    if result.count(-1) > 1:
        raise ValueError
    if -1 in result:
        rest = math.prod(size for size in result if size != -1)
        result[result.index(-1)] = math.prod(data) // rest
    if math.prod(result) != math.prod(data):
        raise ValueError
    return tuple(result)


def reshape_codes(call: Attributes) -> tuple[tuple[int, ...], bool]:
    """The codes of a Reshape, those of old files put into today's, and whether they are read from right to left."""
    codes, legacy = call.integers("shape", None), call.integers("target_shape", None)
    reverse, keep_highest = call.boolean("reverse", False), call.boolean("keep_highest", False)
    if codes is None and legacy is not None:
        rest = tuple(-1 if size == 0 else size for size in legacy)
        codes = (0, *rest[1:]) if keep_highest else rest
    if codes is None:
        raise call.error("attribute 'shape' is missing")
    return codes, reverse


def decode_reshape(shape: Sequence[int], codes: Sequence[int], reverse: bool) -> list[int]:
    """The shape that MXNet's codes mean for data of `shape`; one -1 may remain.

    0 copies an axis, -1 is inferred, -2 copies all the rest, -3 multiplies the next two, -4 splits one into the two
    numbers that follow (one may be -1). `reverse` reads both lists from right to left.
    """
    if reverse:
        shape, codes = list(reversed(shape)), list(reversed(codes))
    result: list[int] = []
    source, position = 0, 0
    while position < len(codes):
        code = codes[position]
        position += 1
        if code == -2:
            result.extend(shape[source:])
            source = len(shape)
        elif code == -3:
            result.append(shape[source] * shape[source + 1])
            source += 2
        elif code == -4:
            first, second = codes[position], codes[position + 1]
            position += 2
            result.append(shape[source] // second if first == -1 else first)
            result.append(shape[source] // first if second == -1 else second)
            source += 1
        elif code == 0:
            result.append(shape[source])
            source += 1
        elif code > 0 or code == -1:
            result.append(code)
            source += 1
        else:
            raise ValueError(code)
    return list(reversed(result)) if reverse else result


@rule("reshape_like")
def reshape_like(call, data, like):
    if math.prod(data) != math.prod(like):
        raise ValueError
    return like


@rule("expand_dims")
def expand_dims(call, data):
    axis = _axis(call.integer("axis"), len(data) + 1)
    return (*data[:axis], 1, *data[axis:])


@rule("squeeze")
def squeeze(call, data):
    axes = call.integers("axis", None)
    ones = {axis for axis, size in enumerate(data) if size == 1}
    chosen = ones if axes is None else {_axis(axis, len(data)) for axis in axes}
    if not chosen <= ones:
        raise ValueError
    return tuple(size for axis, size in enumerate(data) if axis not in chosen) or (1,)


@rule("transpose")
def transpose(call, data):
    axes = call.integers("axes", tuple(reversed(range(len(data)))))
    if sorted(_axis(axis, len(data)) for axis in axes) != list(range(len(data))):
        raise ValueError
    return tuple(data[axis] for axis in axes)


@rule("SwapAxis", "swapaxes")
def swap_axes(call, data):
    first, second = call.integer("dim1", 0), call.integer("dim2", 0)
    result = list(data)
    result[first], result[second] = data[second], data[first]
    return tuple(result)


@rule("Concat", "concat")
def concat(call, data, *others):
    axis = _axis(call.integer("dim", 1), len(data))
    parts = [data, *others]
    if len({(*part[:axis], *part[axis + 1 :]) for part in parts}) != 1:
        raise ValueError
    return (*data[:axis], sum(part[axis] for part in parts), *data[axis + 1 :])


@rule("stack")
def stack(call, data, *others):
    axis = _axis(call.integer("axis", 0), len(data) + 1)
    if any(other != data for other in others):
        raise ValueError
    return (*data[:axis], 1 + len(others), *data[axis:])


@rule("SliceChannel", "split")
def slice_channel(call, data):
    axis, count = _axis(call.integer("axis", 1), len(data)), call.integer("num_outputs")
    size, squeezed = data[axis] // count, call.boolean("squeeze_axis", False)
    if data[axis] % count or (squeezed and size != 1):
        raise call.error(f"{data[axis]} elements do not split into {count} such parts")
    part = (*data[:axis], *(() if squeezed else (size,)), *data[axis + 1 :])
    return [part] * count


@rule("slice", "crop")
def slice_axes(call, data):
    begin, end = call.integers("begin"), call.integers("end")
    step = call.integers("step", (None,) * len(begin))
    windows = [slice(*numbers) for numbers in zip(begin, end, step)]
    return (*(_kept(size, window) for size, window in zip(data, windows)), *data[len(windows) :])


def _kept(size: int, window: slice) -> int:
    return len(range(*window.indices(size)))


@rule("slice_axis")
def slice_axis(call, data):
    axis = _axis(call.integer("axis"), len(data))
    kept = _kept(data[axis], slice(call.integer("begin"), call.integer("end", None)))
    return (*data[:axis], kept, *data[axis + 1 :])


@rule("slice_like")
def slice_like(call, data, like):
    axes = {_axis(axis, len(data)) for axis in call.integers("axes", tuple(range(len(data))))}
    return tuple(like[axis] if axis in axes else size for axis, size in enumerate(data))


@rule("broadcast_to")
def broadcast_to(call, data):
    return tuple(size or old for size, old in zip(call.integers("shape"), data))


@rule("broadcast_axis", "broadcast_axes")
def broadcast_axis(call, data):
    sizes = dict(zip(call.integers("axis"), call.integers("size")))
    return tuple(sizes.get(axis, size) for axis, size in enumerate(data))


@rule("broadcast_like")
def broadcast_like(call, data, like):
    return like
