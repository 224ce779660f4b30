"""A translated graph made faster for inference: the same logits up to rounding from fewer and cheaper operations.

    fast = optimize_for_inference(module)
    with torch.inference_mode():
        probabilities = fast(images)

What it does: BatchNorms become part of the convolution before them, or after them where that is exact; the product
and the sum at the end of a squeeze-excitation unit become one pass; on CPUs weights are stored as oneDNN wants them
and activations and sums are computed where the convolution's result is still in registers. The result has no
parameters under MXNet's names any more and cannot be trained, exported or loaded into: keep the original for that.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graph.torch_ops import BatchNorm, Dropout, unique_attribute

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
SUMS = (torch.add, operator.iadd)
RELUS = (torch.relu, torch.relu_)
# Arguments of a convolution by position.
STRIDE, PADDING, DILATION, GROUPS = 3, 4, 5, 6


def optimize_for_inference(module: fx.GraphModule, *, prepack: bool = True) -> fx.GraphModule:
    """A faster module for inference in float32; `module`, which `to_torch` made and which holds its weights, stays.

    prepack: where PyTorch has oneDNN and the weights are on the CPU, use its packed weights and fused convolutions;
    such a module runs in float32 and in inference mode only, for any batch and image size. False leaves public
    operators alone, which run on every device and under autocast. Large batches on a CPU gain as much again from
    `graph.memory.keep_freed_memory()`, which acts on the whole process and is the caller's to decide on.
    """
    fast = copy.deepcopy(module).eval().requires_grad_(False)
    fast.meta.pop("mxnet", None)
    work = _Rewriter(fast)
    work.remove_dropout()
    work.fold_into_producers()
    work.fold_into_consumers()
    work.interleave_channels()
    if prepack and can_prepack(fast):
        work.prepack()
    work.fuse_scaled_sums()
    work.finish()
    return fast


def can_prepack(module: nn.Module) -> bool:
    """Whether oneDNN's packed convolutions are there for the module's weights."""
    on_cpu = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in module.parameters())
    has_operator = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return on_cpu and has_operator and torch.backends.mkldnn.is_available()


@dataclass(frozen=True)
class _Scaling:
    """What a BatchNorm does in inference, by channel and in float64: `x * factor + offset`."""

    factor: Tensor
    offset: Tensor


class PackedConvolution(nn.Module):
    """A convolution on oneDNN's packed weights, with the sum and the ReLU that follow it: relu(conv(data) + other).

    The packed form depends on whether oneDNN gets one image or several, so both are kept once they were needed.
    overwrite: the result may lie in the memory of `other`. Uses the operators behind torch.compile's inference mode,
    see `can_prepack`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: tuple, relu: bool, overwrite: bool):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        stride, padding, dilation, groups = geometry
        self.geometry = list(padding), list(stride), list(dilation), groups
        self.relu, self.overwrite = relu, overwrite
        self._packed: dict[bool, Tensor] = {}

    def forward(self, data: Tensor, other: Tensor | None = None) -> Tensor:
        constants = self._packed_for(data), self.bias
        if other is None:
            activation = ("relu" if self.relu else "none", [], "")
            return torch.ops.mkldnn._convolution_pointwise(data, *constants, *self.geometry, *activation)
        activation = ("add", 1.0, "relu" if self.relu else None, [], None)
        if self.overwrite:
            return torch.ops.mkldnn._convolution_pointwise_(other, data, *constants, *self.geometry, *activation)
        return torch.ops.mkldnn._convolution_pointwise(data, other, *constants, *self.geometry, *activation)

    def _packed_for(self, data: Tensor) -> Tensor:
        single = data.shape[0] == 1
        if single not in self._packed:
            dense = self.weight.contiguous().to_mkldnn()
            self._packed[single] = torch._C._nn.mkldnn_reorder_conv2d_weight(dense, *self.geometry, list(data.shape))
        return self._packed[single]

    def extra_repr(self) -> str:
        padding, stride, dilation, groups = self.geometry
        return f"{padding=}, {stride=}, {dilation=}, {groups=}, relu={self.relu}"


class _Rewriter:
    """Passes over the nodes of one module, which it changes."""

    def __init__(self, module: fx.GraphModule):
        self.module, self.graph = module, module.graph

    def finish(self) -> None:
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name in [
            *dict(self.module.named_parameters(recurse=False)),
            *dict(self.module.named_buffers(recurse=False)),
        ]:
            if name not in used:
                delattr(self.module, name)
        self.module.recompile()

    def remove_dropout(self) -> None:
        for node in list(self.graph.nodes):
            layer = self._layer(node, Dropout)
            if layer is not None and not layer.always:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def interleave_channels(self) -> None:
        """Images enter as channels_last and stay so, whatever layout the caller has: the fastest for every layer."""
        self.module.to(memory_format=torch.channels_last)
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and any(user.target is torch.conv2d for user in self._readers(node)):
                users = list(node.users)
                with self.graph.inserting_after(node):
                    ordered = self.graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
                for user in users:
                    user.replace_input_with(node, ordered)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads `node`, directly or after a BatchNorm."""
        layers = [user for user in node.users if self._layer(user, BatchNorm) is not None]
        return [*node.users, *(user for layer in layers for user in layer.users)]

    # -- BatchNorm

    def fold_into_producers(self) -> None:
        """BatchNorm of a convolution's or a dense layer's result: its factor goes into weight and bias."""
        for node in list(self.graph.nodes):
            scaling = self._scaling(node)
            if scaling is None:
                continue
            source = node.args[0]
            if not self._has_weights(source) or len(source.users) > 1:
                continue
            weight, bias = self._weights(source)
            factor = scaling.factor.reshape(-1, *[1] * (weight.dim() - 1))
            offset = scaling.offset if bias is None else scaling.offset + bias * scaling.factor
            self._set_weights(source, weight * factor, offset)
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)

    def fold_into_consumers(self) -> None:
        """BatchNorm before convolutions: exact where no padding, which holds zeros, is between the two."""
        for node in list(self.graph.nodes):
            scaling = self._scaling(node)
            if scaling is None or not all(self._takes(user, node, scaling) for user in node.users):
                continue
            for user in list(node.users):
                weight, bias = self._weights(user)
                inputs = weight.shape[1]
                groups = user.args[GROUPS] if user.target in CONVOLUTIONS else 1
                grouped = weight.reshape(groups, -1, *weight.shape[1:])
                shape = (groups, 1, inputs, *[1] * (weight.dim() - 2))
                shift = (grouped * scaling.offset.reshape(shape)).flatten(2).sum(2).flatten()
                scaled = (grouped * scaling.factor.reshape(shape)).reshape(weight.shape)
                self._set_weights(user, scaled, shift if bias is None else shift + bias)
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)

    def _takes(self, user: fx.Node, node: fx.Node, scaling: _Scaling) -> bool:
        if not self._has_weights(user) or user.args[0] is not node:
            return False
        padded = user.target in CONVOLUTIONS and any(user.args[PADDING])
        return not padded or not scaling.offset.any()

    def _scaling(self, node: fx.Node) -> _Scaling | None:
        layer = self._layer(node, BatchNorm)
        if layer is None or layer.axis != 1:
            return None
        gamma, beta, mean, variance = (self._constant(value) for value in node.args[1:])
        if any(value is None for value in (gamma, beta, mean, variance)):
            return None
        factor = (variance.double() + layer.eps).rsqrt()
        factor = factor if layer.fix_gamma else factor * gamma.double()
        return _Scaling(factor, beta.double() - mean.double() * factor)

    # -- packed convolutions

    def prepack(self) -> None:
        """Convolutions with packed weights, and the sum and the ReLU after them in the same operation."""
        self._position = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is torch.conv2d and self._has_weights(node):
                self._prepack(node)

    def _prepack(self, node: fx.Node) -> None:
        total = self._sum_after(node)
        other = None if total is None else self._other_operand(total, node)
        relu = self._relu_after(node if total is None else total)
        replaced = [old for old in (relu, total, node) if old is not None]
        overwrite = other is not None and self._may_overwrite(other, total)
        layer = PackedConvolution(*self._float_weights(node), node.args[STRIDE:], relu is not None, overwrite)
        name = unique_attribute(self.module, f"{node.name}_packed")
        self.module.add_module(name, layer)
        with self.graph.inserting_before(replaced[0]):
            fused = self.graph.call_module(name, (node.args[0],) if other is None else (node.args[0], other))
        fused.meta.update(replaced[0].meta)
        self._position[fused] = self._position[replaced[0]]
        replaced[0].replace_all_uses_with(fused)
        for old in replaced:
            self.graph.erase_node(old)

    def _sum_after(self, node: fx.Node) -> fx.Node | None:
        """The sum that alone reads `node`."""
        (user, *more) = node.users
        return user if not more and self._is_sum(user) and user.args[0] is not user.args[1] else None

    def _relu_after(self, node: fx.Node) -> fx.Node | None:
        (user, *more) = node.users
        return user if not more and user.target in RELUS else None

    # -- sums

    def fuse_scaled_sums(self) -> None:
        """`x * scale + shortcut`, the end of a squeeze-excitation unit, in one pass."""
        self._position = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            if not self._is_sum(node):
                continue
            for product in node.args:
                if product.target is torch.mul and len(product.users) == 1 and node.args[0] is not node.args[1]:
                    self._fuse_scaled_sum(node, product, self._other_operand(node, product))
                    break

    def _fuse_scaled_sum(self, node: fx.Node, product: fx.Node, other: fx.Node) -> None:
        method = "addcmul_" if self._may_overwrite(other, node) else "addcmul"
        with self.graph.inserting_before(node):
            fused = self.graph.call_method(method, (other, *product.args))
        fused.meta.update(node.meta)
        self._position[fused] = self._position[node]
        node.replace_all_uses_with(fused)
        self.graph.erase_node(node)
        self.graph.erase_node(product)

    def _is_sum(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target in SUMS and bool(node.meta.get("same_shape"))

    def _other_operand(self, total: fx.Node, node: fx.Node) -> fx.Node:
        return total.args[1] if total.args[0] is node else total.args[0]

    def _may_overwrite(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` is the last to read `value`, which lies in memory of its own."""
        last = all(self._position[user] <= self._position[reader] for user in value.users)
        own = value.target in (*CONVOLUTIONS, *RELUS) or self._layer(value, (PackedConvolution, BatchNorm)) is not None
        return last and own

    # -- weights

    def _layer(self, node: fx.Node, kind: type | tuple[type, ...]) -> nn.Module | None:
        layer = self.module.get_submodule(node.target) if node.op == "call_module" else None
        return layer if isinstance(layer, kind) else None

    def _constant(self, node: fx.Node) -> Tensor | None:
        return getattr(self.module, node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _has_weights(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target not in (*CONVOLUTIONS, F.linear):
            return False
        if node.target is F.linear and len(node.meta.get("shape", ())) != 2:
            return False
        return self._constant(node.args[1]) is not None and (
            node.args[2] is None or self._constant(node.args[2]) is not None
        )

    def _weights(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in float64."""
        bias = None if node.args[2] is None else self._constant(node.args[2]).double()
        return self._constant(node.args[1]).double(), bias

    def _float_weights(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        bias = None if node.args[2] is None else self._constant(node.args[2]).float()
        return self._constant(node.args[1]).float(), bias

    def _set_weights(self, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
        old = self._constant(node.args[1])
        kept = torch.empty_like(old).copy_(weight)  # the same precision and layout
        with self.graph.inserting_before(node):
            new = self._new_constant(f"{node.name}_folded", kept), self._new_constant(f"{node.name}_bias", bias.to(old))
        node.args = (node.args[0], *new, *node.args[3:])

    def _new_constant(self, name: str, value: Tensor) -> fx.Node:
        attribute = unique_attribute(self.module, name)
        self.module.register_buffer(attribute, value)
        return self.graph.get_attr(attribute)
