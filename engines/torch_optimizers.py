"""MXNet's update rules on PyTorch tensors: the same operations in the same order, so the same float32 numbers.

A rule takes lists of tensors and changes weights and states in place; gradients are used as scratch space. Every
product of two scalars is rounded to float32 as MXNet's kernels do, and no multiplication is contracted with an
addition (`alpha=` of torch's additions would do that), which makes the results equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graph.symbol_json import Graph

# MXNet's defaults; not in the flags, so not in the files either.
ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8
DECAYED_SUFFIXES = ("_weight", "_gamma")


@dataclass(frozen=True)
class Step:
    """The scalars of one update: rate and decay of this group, gradient scale, momentum, number of the update."""

    lr: float
    wd: float
    rescale: float
    momentum: float
    update: int


Rule = Callable[[list, list, Sequence[list], Step], None]


def _f32(value: float) -> float:
    """`value` rounded to float32."""
    return float(np.float32(value))


def _times(left: float, right: float) -> float:
    """The float32 product of two float32 numbers."""
    return float(np.float32(left) * np.float32(right))


def plain_nag(weights: list[Tensor], gradients: list[Tensor], states: Sequence[list[Tensor]], step: Step) -> None:
    """w = (1 - lr wd) w - (lr r) g: nag without momentum."""
    torch._foreach_mul_(weights, float(np.float32(1) - np.float32(step.lr) * np.float32(step.wd)))
    torch._foreach_mul_(gradients, _times(step.lr, step.rescale))
    torch._foreach_sub_(weights, gradients)


def plain_sgd(weights: list[Tensor], gradients: list[Tensor], states: Sequence[list[Tensor]], step: Step) -> None:
    """w = w + (-(lr wd) w - (lr r) g): sgd without momentum, for which MXNet takes another kernel than for nag."""
    torch._foreach_mul_(gradients, _times(step.lr, step.rescale))
    if step.wd:
        torch._foreach_add_(gradients, torch._foreach_mul(weights, _times(step.lr, step.wd)))
    torch._foreach_sub_(weights, gradients)


def sgd(weights: list[Tensor], gradients: list[Tensor], states: Sequence[list[Tensor]], step: Step) -> None:
    """m = mu m - (lr wd) w - (lr r) g; w = w + m."""
    (momenta,) = states
    torch._foreach_mul_(momenta, _f32(step.momentum))
    if step.wd:
        torch._foreach_sub_(momenta, torch._foreach_mul(weights, _times(step.lr, step.wd)))
    torch._foreach_mul_(gradients, _times(step.lr, step.rescale))
    torch._foreach_sub_(momenta, gradients)
    torch._foreach_add_(weights, momenta)


def nag(weights: list[Tensor], gradients: list[Tensor], states: Sequence[list[Tensor]], step: Step) -> None:
    """m = mu m; w' = (w - m) + (mu + 1) (m - d(w)); m = m - d(w'), with d(w) = lr (r g + wd w).

    The momentum is decayed with the new weight, a quirk of MXNet's kernel.
    """
    (momenta,) = states
    lr, wd = _f32(step.lr), _f32(step.wd)

    def descent() -> list[Tensor]:
        if not wd:
            return torch._foreach_mul(gradients, lr)
        result = torch._foreach_mul(weights, wd)
        torch._foreach_add_(result, gradients)
        torch._foreach_mul_(result, lr)
        return result

    torch._foreach_mul_(gradients, _f32(step.rescale))
    torch._foreach_mul_(momenta, _f32(step.momentum))
    ahead = torch._foreach_sub(momenta, descent())
    torch._foreach_mul_(ahead, float(np.float32(step.momentum) + np.float32(1)))
    torch._foreach_sub_(weights, momenta)
    torch._foreach_add_(weights, ahead)
    torch._foreach_sub_(momenta, descent())


def adam(weights: list[Tensor], gradients: list[Tensor], states: Sequence[list[Tensor]], step: Step) -> None:
    """g' = r g + wd w; M, V move by beta1, beta2; w = w - lr_t M / (sqrt(V) + eps).

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t) corrects the bias of the moments' start at zero.
    """
    means, variances = states
    rate = step.lr * (math.sqrt(1 - ADAM_BETA2**step.update) / (1 - ADAM_BETA1**step.update))
    torch._foreach_mul_(gradients, _f32(step.rescale))
    if step.wd:
        torch._foreach_add_(gradients, torch._foreach_mul(weights, _f32(step.wd)))
    beta1, beta2 = np.float32(ADAM_BETA1), np.float32(ADAM_BETA2)
    torch._foreach_mul_(means, float(beta1))
    torch._foreach_add_(means, torch._foreach_mul(gradients, float(np.float32(1) - beta1)))
    squares = torch._foreach_mul(gradients, float(np.float32(1) - beta2))
    torch._foreach_mul_(squares, gradients)
    torch._foreach_mul_(variances, float(beta2))
    torch._foreach_add_(variances, squares)
    divisors = _roots(variances)
    torch._foreach_add_(divisors, _f32(ADAM_EPSILON))
    moves = torch._foreach_mul(means, _f32(rate))
    torch._foreach_div_(moves, divisors)
    torch._foreach_sub_(weights, moves)


def rule_of(optimizer: str, momentum: float) -> tuple[Rule, tuple[str, ...]]:
    """The rule of an optimizer's name and the names of the arrays it keeps for a parameter."""
    if optimizer == "adam":
        return adam, ("mean", "variance")
    if momentum == 0:
        return {"sgd": plain_sgd, "nag": plain_nag}[optimizer], ()
    return {"sgd": sgd, "nag": nag}[optimizer], ("momentum",)


def multipliers(graph: Graph, name: str) -> tuple[float, float]:
    """What a parameter's rate and its weight decay are multiplied by.

    Decay acts on names that end in _weight or _gamma; `__lr_mult__` and `__wd_mult__` of the variable override.
    """
    variable = graph.variable(name)
    decay = float(name.endswith(DECAYED_SUFFIXES))
    lr_mult, wd_mult = variable.hidden("lr_mult"), variable.hidden("wd_mult")
    return float(lr_mult) if lr_mult else 1.0, float(wd_mult) if wd_mult else decay


def _roots(tensors: list[Tensor]) -> list[Tensor]:
    """Correctly rounded square roots; PyTorch's CPU kernel takes a vector library that is an ulp off at times."""
    if tensors[0].is_cuda:
        return torch._foreach_sqrt(tensors)
    return [tensor.double().sqrt_().float() for tensor in tensors]


class Optimizer:
    """One rule over all parameters, which are grouped by their multipliers.

    On CPUs one parameter is finished before the next begins, so that its passes find it in the cache; on GPUs all of a
    group go through each operation together, so that few kernels are launched.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        graph: Graph,
        *,
        optimizer: str,
        momentum: float,
        wd: float,
        together: bool,
    ):
        self._rule, self.slots = rule_of(optimizer, momentum)
        self._weights, self._momentum, self._wd = dict(weights), momentum, wd
        self.states = {slot: {n: torch.zeros_like(w) for n, w in weights.items()} for slot in self.slots}
        groups: dict[tuple[float, float], list[str]] = {}
        for name in weights:
            groups.setdefault(multipliers(graph, name), []).append(name)
        self._groups = [
            (factors, batch)
            for factors, names in groups.items()
            for batch in ([names] if together else [[name] for name in names])
        ]

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float, rescale: float, update: int) -> None:
        """Move all weights; `update` counts from 1. The gradients' contents are lost."""
        for (lr_mult, wd_mult), names in self._groups:
            step = Step(lr * lr_mult, self._wd * wd_mult, rescale, self._momentum, update)
            states = [[self.states[slot][name] for name in names] for slot in self.slots]
            self._rule([self._weights[n] for n in names], [gradients[n] for n in names], states, step)
