"""A Symbol graph as a PyTorch module: the same arithmetic, parameters under MXNet's names.

    module = to_torch(load("model-symbol.json"), {"data": (1, 3, 224, 224)})
    load_params(module, read_arrays("model-0050.params"))
    probabilities = module.eval()(images)

The module is a `torch.fx.GraphModule`: `print(module.code)` shows one line an operation, and compilation, export and
autocast work as for any module. Shapes given here only resolve parameter shapes and ranks; other batch and image
sizes run as well wherever the graph itself does not fix them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from errors import UsageError
from graph import torch_ops
from graph.shapes import LABELLED_OPS, PARAMETERS, Shape
from graph.symbol_json import Attributes, Entry, Graph, GraphError, Node
from graph.torch_ops import OPS, Call, unique_attribute

DEFAULT_SHAPES = {"data": (1, 3, 224, 224)}


@dataclass(frozen=True)
class Names:
    """What a translated module's attributes are called in MXNet; kept in `module.meta["mxnet"]`.

    arguments and auxiliary: MXNet's name -> attribute of the module, in MXNet's order, inputs left out. fixed_gammas:
    those arguments that MXNet holds at 1 whatever is stored. inputs: MXNet's names of forward's parameters.
    """

    arguments: Mapping[str, str]
    auxiliary: Mapping[str, str]
    inputs: tuple[str, ...]
    fixed_gammas: tuple[str, ...]


def to_torch(graph: Graph, shapes: Mapping[str, Shape] | None = None) -> fx.GraphModule:
    """Translate `graph`; parameters are zeros until `load_params` fills them.

    shapes: input name -> shape, default one 224 x 224 image called "data". Labels may be left out; they become
    optional arguments of forward. Raises GraphError naming the node for whatever is unknown or does not fit.
    """
    _refuse_unknown_ops(graph)
    translation = _Translation(graph, dict(shapes or DEFAULT_SHAPES))
    return translation.run()


def names_of(module: fx.GraphModule) -> Names:
    """MXNet's names for a module that `to_torch` made."""
    return module.meta["mxnet"]


def named_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """The module's own parameters and buffers as "arg:NAME" and "aux:NAME", in MXNet's order."""
    names = names_of(module)
    found = {f"arg:{name}": getattr(module, attribute) for name, attribute in names.arguments.items()}
    found.update({f"aux:{name}": getattr(module, attribute) for name, attribute in names.auxiliary.items()})
    return found


def load_params(module: fx.GraphModule, params: Mapping[str, np.ndarray]) -> None:
    """Copy "arg:NAME" and "aux:NAME" arrays into the module.

    Raises UsageError with every difference (missing, unknown, of another shape) before anything is copied.
    """
    tensors = named_tensors(module)
    problems = [f"{name} is missing" for name in tensors if name not in params]
    problems += [f"{name} is not in the graph" for name in params if name not in tensors]
    problems += [
        f"{name} is {tuple(params[name].shape)}, the graph needs {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in params and tuple(params[name].shape) != tuple(tensor.shape)
    ]
    if problems:
        raise UsageError(f"the parameters do not fit the graph: {'; '.join(problems)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.array(params[name], dtype=np.float32)))


def read_params(module: fx.GraphModule) -> dict[str, np.ndarray]:
    """Parameters and auxiliary states as float32 arrays, "arg:NAME" and "aux:NAME" in MXNet's order."""
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in named_tensors(module).items()}


def _refuse_unknown_ops(graph: Graph) -> None:
    unknown: dict[str, str] = {}
    for index in graph.order:
        node = graph.nodes[index]
        if not node.is_variable and node.op not in OPS:
            unknown.setdefault(node.op, node.name)
    if unknown:
        listed = ", ".join(f"{op} (node {name!r})" for op, name in sorted(unknown.items()))
        raise GraphError(f"ops that are not supported: {listed}")


class _Translation:
    """One walk over the graph that writes fx nodes and follows their shapes on the meta device."""

    def __init__(self, graph: Graph, shapes: dict[str, Shape]):
        self.graph, self.shapes = graph, shapes
        self.root = nn.Module()
        self.root.eval()
        self.fx_graph = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.fx_graph)
        self.values: dict[Entry, fx.Proxy] = {}
        self.meta: dict[fx.Node, object] = {}
        self.attributes: dict[str, str] = {}
        self.fixed_gammas: list[str] = []
        self.auxiliary = set(graph.auxiliary)

    def run(self) -> fx.GraphModule:
        self._enter_inputs()
        for index in self.graph.order:
            node = self.graph.nodes[index]
            if node.is_variable:
                continue
            self._resolve_parameters(node)
            self._translate(index, node)
        heads = [self._value(head, "heads").node for head in self.graph.heads]
        self.fx_graph.output(heads[0] if len(heads) == 1 else tuple(heads))
        _overwrite_in_place(self.fx_graph, self.root)
        self.fx_graph.lint()
        module = fx.GraphModule(self.root, self.fx_graph, "MXNetGraph")
        module.meta["mxnet"] = self._names()
        return module.train()

    def _enter_inputs(self) -> None:
        labels = {
            node.inputs[1].node
            for node in (self.graph.nodes[index] for index in self.graph.order)
            if node.op in LABELLED_OPS and len(node.inputs) == 2
        }
        by_name = {self.graph.nodes[index].name: index for index in self.graph.order}
        for name in self.shapes:
            if name not in self.graph.arguments:
                first = self.graph.arguments[0]
                raise GraphError(f"the graph has no input {name!r}; its first argument is {first!r}")
        label_names = [self.graph.nodes[index].name for index in sorted(labels) if self._is_variable(Entry(index))]
        self.inputs = [name for name in self.shapes if name not in label_names] + label_names
        for name in self.inputs:
            shape = self.shapes.get(name)
            meta = None if shape is None else torch.empty(shape, device="meta")
            default = {"default_value": None} if name in label_names else {}
            self._enter(by_name[name], self.fx_graph.placeholder(name, **default), meta)

    def _enter(self, index: int, fx_node: fx.Node, meta: Tensor | None) -> None:
        self.values[Entry(index)] = fx.Proxy(fx_node, self.tracer)
        self._record(fx_node, meta)

    def _record(self, fx_node: fx.Node, meta: object) -> None:
        self.meta[fx_node] = meta
        if isinstance(meta, Tensor):
            fx_node.meta["shape"] = tuple(meta.shape)

    def _resolve_parameters(self, node: Node) -> None:
        """Give every variable that `node` is the first to use its shape."""
        unknown = [entry for entry in node.inputs if entry not in self.values and self._is_variable(entry)]
        if not unknown:
            return
        implied: dict[Entry, Shape] = {}
        rule = PARAMETERS.get(node.op)
        first = self.values.get(node.inputs[0])
        if rule is not None and first is not None:
            try:
                shapes = rule(Attributes(node), torch_ops.shape_of(first))
            except (IndexError, ZeroDivisionError):
                message = f"does not fit data of shape {torch_ops.shape_of(first)}"
                raise Attributes(node).error(message) from None
            implied = dict(zip(node.inputs[1:], shapes))
        for entry in unknown:
            shape = implied.get(entry) or self._declared_shape(entry)
            if not shape:
                name = self.graph.nodes[entry.node].name
                raise Attributes(node).error(f"the shape of {name!r} cannot be inferred; give it as an input")
            self._enter_parameter(entry, shape)

    def _is_variable(self, entry: Entry) -> bool:
        return self.graph.nodes[entry.node].is_variable

    def _declared_shape(self, entry: Entry) -> Shape | None:
        """The `__shape__` that Gluon writes on a variable, when it is complete."""
        declared = Attributes(self.graph.nodes[entry.node]).integers("__shape__", None)
        return declared if declared and all(size > 0 for size in declared) else None

    def _enter_parameter(self, entry: Entry, shape: Shape) -> None:
        name = self.graph.nodes[entry.node].name
        attribute = unique_attribute(self.root, name)
        if name in self.auxiliary:
            self.root.register_buffer(attribute, torch.zeros(shape))
        else:
            self.root.register_parameter(attribute, nn.Parameter(torch.zeros(shape)))
        self.attributes[name] = attribute
        self._enter(entry.node, self.fx_graph.get_attr(attribute), torch.empty(shape, device="meta"))

    def _value(self, entry: Entry, where: str) -> fx.Proxy:
        if entry not in self.values:
            name = self.graph.nodes[entry.node].name
            raise GraphError(f"{where}: output {entry.output} of {name!r} does not exist or is not supported")
        return self.values[entry]

    def _translate(self, index: int, node: Node) -> None:
        call = Call(node, self.fx_graph, self.root, self.tracer)
        op = OPS[node.op]
        op.check_inputs(call, len(node.inputs))
        inputs = [self._value(entry, f"node {node.name!r}") for entry in node.inputs]
        known = len(self.fx_graph.nodes)
        outputs = op.translate(call, *inputs)
        call.finish()
        new = list(self.fx_graph.nodes)[known:]
        self._follow(call, new)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if len(outputs) == 1 and outputs[0].node in new:
            outputs[0].node._rename(unique_attribute(nn.Module(), node.name))
        self.values.update({Entry(index, position): value for position, value in enumerate(outputs)})
        if node.op == "BatchNorm" and call.boolean("fix_gamma", True):
            self.fixed_gammas.append(self.graph.nodes[node.inputs[1].node].name)

    def _follow(self, call: Call, new: list[fx.Node]) -> None:
        """Run the new fx nodes on the meta device, which finds shapes that do not fit."""
        for fx_node in new:
            args = fx.map_arg(fx_node.args, self.meta.__getitem__)
            kwargs = fx.map_arg(fx_node.kwargs, self.meta.__getitem__)
            target = fx_node.target
            try:
                if fx_node.op == "call_module":
                    result = self.root.get_submodule(target).eval()(*args, **kwargs)
                elif fx_node.op == "call_method":
                    result = getattr(args[0], target)(*args[1:], **kwargs)
                else:
                    result = target(*args, **kwargs)
            except (RuntimeError, IndexError, ValueError) as error:
                shapes = [tuple(value.shape) for value in args if isinstance(value, Tensor)]
                reason = str(error).splitlines()[0]
                raise call.error(f"does not fit inputs of shapes {shapes}: {reason}") from None
            self._record(fx_node, result)

    def _names(self) -> Names:
        def found(names):
            return {name: self.attributes[name] for name in names if name in self.attributes}

        fixed = tuple(dict.fromkeys(self.fixed_gammas))
        return Names(found(self.graph.arguments), found(self.graph.auxiliary), tuple(self.inputs), fixed)


# Ops that can write into their first input, and which ops leave an output behind that their own backward never
# reads, nor anything else: together they decide where a value's memory is used again.
IN_PLACE = {
    torch.relu: torch.relu_,
    torch.sigmoid: torch.sigmoid_,
    torch.tanh: torch.tanh_,
    torch.add: operator.iadd,
}
DISPOSABLE = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.linear,
    F.avg_pool2d,
    torch.add,
    torch.mul,
    torch.sub,
    torch.bmm,
    torch.cat,
    operator.iadd,
}


def _overwrite_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Let activations and elementwise sums overwrite an input that nobody else reads, as hand-written code does."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in IN_PLACE or node.kwargs:
            continue
        if node.target is torch.add:
            if not node.meta.get("same_shape") or node.args[0] is node.args[1]:
                continue
            if not _is_disposable(node.args[0], root):
                node.args = tuple(reversed(node.args))
        if _is_disposable(node.args[0], root):
            node.target = IN_PLACE[node.target]


def _is_disposable(node: fx.Node, root: nn.Module) -> bool:
    if len(node.users) != 1:
        return False
    if node.op == "call_module":
        return isinstance(root.get_submodule(node.target), torch_ops.BatchNorm)
    return node.op == "call_function" and node.target in DISPOSABLE
