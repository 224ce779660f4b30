"""The same symbol in MXNet and as a PyTorch graph, from the same numbers: what the two computed, side by side."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from graph.shapes import infer
from graph.symbol_json import Graph, parse
from graph.to_torch import load_params, named_tensors, names_of, read_params, to_torch
from graph.torch_ops import OPS, BatchNorm, Op
from mxnet_compat import mx

# Names under which graphs add two activations.
ADDITIONS = ("elemwise_add", "_plus", "_Plus", "broadcast_add")


@dataclass
class Results:
    """Outputs, gradients by argument name and moving statistics of one forward and backward."""

    outputs: list[np.ndarray]
    gradients: dict[str, np.ndarray]
    auxiliary: dict[str, np.ndarray]


def value(name: str, shape: tuple) -> np.ndarray:
    """Numbers that keep activations of deep networks in range, as tests/golden/README.md fills them in."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(("gamma", "_var")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("_weight"):
        return (rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
    return (rng.normal(size=shape) * (0.1 if name.endswith(("_bias", "beta", "_mean")) else 1.0)).astype(np.float32)


def fill(symbol, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs (and auxiliary states) as given, a value for everything else, as "arg:NAME" and "aux:NAME"."""
    shapes, _, aux_shapes = symbol.infer_shape(**input_shapes(symbol, inputs))
    filled = {f"arg:{n}": inputs.get(n, value(n, s)) for n, s in zip(symbol.list_arguments(), shapes)}
    if _branch_scale != 1:
        for name in ends_of_branches(parse(symbol.tojson())):
            filled[f"arg:{name}"] = filled[f"arg:{name}"] * np.float32(_branch_scale)
    states = zip(symbol.list_auxiliary_states(), aux_shapes)
    filled.update({f"aux:{n}": inputs.get(n, value(n, s)) for n, s in states})
    return filled


_branch_scale = 1.0


@contextlib.contextmanager
def damped_branches(scale: float = 0.2):
    """Residual branches are scaled down, as in trained networks they are small beside what they are added to.

    With branches as strong as their shortcuts a network of fifty of them amplifies a rounding error a thousand times.
    """
    global _branch_scale
    before, _branch_scale = _branch_scale, scale
    try:
        yield
    finally:
        _branch_scale = before


def ends_of_branches(graph: Graph) -> set[str]:
    """For every sum the weights, or BatchNorm's scale, that its longer branch goes through last."""
    nodes = graph.nodes
    depths: list[int] = []
    for node in nodes:
        depths.append(1 + max((depths[entry.node] for entry in node.inputs), default=0))
    found = set()
    for node in nodes:
        if node.op not in ADDITIONS:
            continue
        at = nodes[max((entry.node for entry in node.inputs), key=depths.__getitem__)]
        while at.inputs:
            inputs = [nodes[entry.node] for entry in at.inputs]
            weights = [part.name for part in inputs if not part.inputs and part.name.endswith(("_gamma", "_weight"))]
            if weights:
                found.add(weights[0])
                break
            # Of a squeeze-excite product the first factor is the branch itself.
            at = inputs[0]
    return found


def input_shapes(symbol, inputs: dict[str, np.ndarray]) -> dict[str, tuple]:
    """Shapes of those `inputs` that are arguments of the symbol."""
    arguments = set(symbol.list_arguments())
    return {name: array.shape for name, array in inputs.items() if name in arguments}


def head_gradients(outputs: list) -> list[np.ndarray]:
    rng = np.random.RandomState(7)
    return [rng.normal(size=tuple(output.shape)).astype(np.float32) for output in outputs]


def run_mxnet(
    symbol, inputs: dict[str, np.ndarray], train: bool, backward: bool = True, dtype: str = "float32"
) -> Results:
    """Forward, and backward from random head gradients, on MXNet's CPU kernels."""

    def array(numbers: np.ndarray) -> mx.nd.NDArray:
        return mx.nd.array(numbers.astype(dtype), dtype=dtype)

    filled = fill(symbol, inputs)
    args = {name: array(filled[f"arg:{name}"]) for name in symbol.list_arguments()}
    aux = {name: array(filled[f"aux:{name}"]) for name in symbol.list_auxiliary_states()}
    grads = {name: mx.nd.zeros(arg.shape, dtype=dtype) for name, arg in args.items()} if backward else None
    # With it, inference of pre-activation networks (GluonCV's cifar_resnet20_v2) is wrong by half of the largest
    # logit: MXNet fuses a convolution with a sum whose other input is still needed.
    os.environ["MXNET_SUBGRAPH_BACKEND"] = "NONE"
    bound = symbol.bind(mx.cpu(), args, args_grad=grads, aux_states=aux, grad_req="write" if backward else "null")
    outputs = bound.forward(is_train=train)
    if backward:
        bound.backward([array(head) for head in head_gradients(outputs)])
    mx.nd.waitall()
    gradients = {name: gradient.asnumpy() for name, gradient in (grads or {}).items()}
    return Results([o.asnumpy() for o in outputs], gradients, {name: state.asnumpy() for name, state in aux.items()})


def translated(symbol, inputs: dict[str, np.ndarray]) -> torch.fx.GraphModule:
    """The symbol as a PyTorch module that holds the values of `fill`."""
    module = to_torch(parse(symbol.tojson()), input_shapes(symbol, inputs))
    filled = fill(symbol, inputs)
    load_params(module, {name: filled[name] for name in named_tensors(module)})
    return module


def run_torch(
    symbol, inputs: dict[str, np.ndarray], train: bool, backward: bool = True, dtype: str = "float32"
) -> Results:
    """The same as `run_mxnet` through the translated graph."""
    module = translated(symbol, inputs).to(getattr(torch, dtype)).train(train)
    names = names_of(module).inputs
    tensors = {name: torch.from_numpy(inputs[name].astype(dtype)).requires_grad_(backward) for name in names}
    outputs = module(*tensors.values())
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    gradients = {}
    if backward:
        heads = [torch.from_numpy(head.astype(dtype)) for head in head_gradients(outputs)]
        torch.autograd.backward(outputs, heads)
        named = {**tensors, **{n[4:]: t for n, t in named_tensors(module).items() if n.startswith("arg:")}}
        gradients = {n: np.zeros(t.shape, np.float32) if t.grad is None else t.grad.numpy() for n, t in named.items()}
    auxiliary = {n[4:]: state.numpy() for n, state in named_tensors(module).items() if n.startswith("aux:")}
    return Results([output.detach().numpy() for output in outputs], gradients, auxiliary)


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |a - b| / max |b|; infinite when the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(np.abs(theirs).max()) if theirs.size else 0.0
    worst = float(np.abs(ours - theirs).max()) if theirs.size else 0.0
    return worst / scale if scale else worst


def assert_same_shapes(symbol, shapes: dict[str, tuple[int, ...]]) -> None:
    """Inference without a framework finds MXNet's shape of every variable and every output that is ours too."""
    internals = symbol.get_internals()
    graph = parse(internals.tojson())
    found = infer(graph, shapes)
    arguments, outputs, auxiliary = internals.infer_shape(**shapes)
    names = [*symbol.list_arguments(), *symbol.list_auxiliary_states()]
    assert found.variables == dict(zip(names, [*arguments, *auxiliary]))
    theirs = dict(zip(graph.heads, outputs))
    assert found.outputs.items() <= theirs.items()
    assert {head for head in theirs if head.output == 0} <= found.outputs.keys()


def assert_same(symbol, inputs, *, train=True, backward=True, tolerance=1e-5, gradient_tolerance=1e-5) -> None:
    """Both frameworks agree on shapes, outputs, gradients of every argument, and moving statistics."""
    assert_same_shapes(symbol, {name: array.shape for name, array in inputs.items()})
    theirs = run_mxnet(symbol, inputs, train, backward)
    ours = run_torch(symbol, inputs, train, backward)
    assert len(ours.outputs) == len(theirs.outputs)
    for mine, other in zip(ours.outputs, theirs.outputs):
        assert deviation(mine, other) <= tolerance, "output"
    for name, other in theirs.gradients.items():
        assert deviation(ours.gradients[name], other) <= gradient_tolerance, f"gradient of {name}"
    for name, other in theirs.auxiliary.items():
        assert deviation(ours.auxiliary[name], other) <= tolerance, f"moving statistic {name}"


def gradient_distances(some: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[float]:
    """max |a - b| / max |b| of every parameter; a gradient below 0.1 % of the largest counts relative to that."""
    floor = 1e-3 * max(float(np.abs(gradient).max()) for gradient in other.values())
    return [
        float(np.abs(some[name] - value).max()) / max(float(np.abs(value).max()), floor)
        for name, value in other.items()
    ]


class MXNetBilinearResize(torch.nn.Module):
    """BilinearResize2D with align_corners as MXNet does it in float64 too: with weights computed in float32."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.size = height, width

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        for axis, length in zip((2, 3), self.size):
            before = data.shape[axis]
            scale = np.float32(before - 1) / np.float32(max(length - 1, 1))
            place = scale * np.arange(length, dtype=np.float32)
            low = place.astype(np.int64)
            shape = [length, 1] if axis == 2 else [length]
            weight = torch.from_numpy((place - low.astype(np.float32)).astype(np.float64)).reshape(shape)
            # Where shapes are found, data have none of their own, and lie on another device.
            rows = (torch.from_numpy(index).to(data.device) for index in (low, np.minimum(low + 1, before - 1)))
            below, above = (data.index_select(axis, index) for index in rows)
            weight = weight.to(data)
            data = (1 - weight) * below + weight * above
        return data


@contextlib.contextmanager
def mxnet_rounding():
    """Graphs translated here compute with what MXNet rounds to float32 when the data are float64."""
    name = "_contrib_BilinearResize2D"
    known = OPS[name]

    def rounded(call, data):
        if not call.boolean("align_corners", True):
            return known.translate(call, data)
        call.choice("mode", ("size",), "size")
        return call.module(MXNetBilinearResize(call.integer("height"), call.integer("width")), data)

    OPS[name] = Op(rounded)
    try:
        yield
    finally:
        OPS[name] = known


def settled(symbol, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moving statistics of a network that has seen `inputs` for long, so that activations keep their range."""
    module = translated(symbol, inputs).train()
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.momentum = 0.0
    with torch.no_grad():
        module(*(torch.from_numpy(inputs[name]) for name in names_of(module).inputs))
    return {name[4:]: array for name, array in read_params(module).items() if name.startswith("aux:")}


@dataclass
class Comparison:
    """Largest deviations of a whole network, see `compare_network`."""

    inference: float  # float32
    training: float  # float32, forward
    statistics: float  # float32
    exact_outputs: float  # float64, training forward
    exact_gradients: float  # float64, the worst of all arguments
    rounding: float  # of MXNet alone: its training forward in float32 against its own in float64


def compare_network(symbol, inputs: dict[str, np.ndarray]) -> Comparison:
    """Inference, training forward and every gradient, in MXNet and in the translated graph.

    Gradients are compared in float64. In float32 a rounding error turns single ReLUs of a deep network on or off,
    which changes some gradients by per cents, MXNet's as well as ours, and would hide mistakes.
    """
    single, theirs = compare_float32(symbol, inputs)
    with mxnet_rounding():
        exact, exact_theirs = (run(symbol, inputs, True, dtype="float64") for run in (run_torch, run_mxnet))
    return Comparison(
        **single,
        exact_outputs=deviation(exact.outputs[0], exact_theirs.outputs[0]),
        exact_gradients=max(gradient_distances(exact.gradients, exact_theirs.gradients)),
        rounding=deviation(theirs, exact_theirs.outputs[0]),
    )


def compare_float32(symbol, inputs: dict[str, np.ndarray]) -> tuple[dict[str, float], np.ndarray]:
    """(The first three numbers of a Comparison, MXNet's output of the training forward)."""
    known = {**inputs, **settled(symbol, inputs)}
    inference = [run(symbol, known, False, False).outputs[0] for run in (run_torch, run_mxnet)]
    ours, theirs = (run(symbol, inputs, True, False) for run in (run_torch, run_mxnet))
    # MXNet moves the statistics in the backward pass.
    states = run_mxnet(symbol, inputs, True).auxiliary
    statistics = max((deviation(ours.auxiliary[n], state) for n, state in states.items()), default=0.0)
    training = deviation(ours.outputs[0], theirs.outputs[0])
    return {"inference": deviation(*inference), "training": training, "statistics": statistics}, theirs.outputs[0]


def assert_network_same(symbol, inputs: dict[str, np.ndarray], tolerance: float) -> None:
    """The graph computes what MXNet computes: within `tolerance` in float32, and but for rounding in float64."""
    found = compare_network(symbol, inputs)
    assert max(found.inference, found.training, found.statistics) <= tolerance, found
    assert max(found.exact_outputs, found.exact_gradients) <= 1e-9, found


def import_gluoncv():
    """GluonCV, whose import refuses PyTorch 2 unless it finds none."""
    hidden = {"torch": sys.modules.get("torch")}
    sys.modules["torch"] = None
    try:
        import gluoncv
    finally:
        sys.modules.update(hidden)
    return gluoncv


def zoo_symbol(name: str):
    """A network of GluonCV's model zoo without its dropout, since no two frameworks draw alike."""
    with mx.name.NameManager():  # the names, from which the values follow, start anew
        # NASNet's second classifier would be a second output.
        options = {"use_aux": False} if name.startswith("nasnet") else {}
        network = import_gluoncv().model_zoo.get_model(name, pretrained=False, **options)
        content = json.loads(network(mx.sym.Variable("data")).tojson())
    for node in content["nodes"]:
        if node["op"] == "Dropout":
            node["attrs"]["p"] = "0"
    return mx.sym.load_json(json.dumps(content))
