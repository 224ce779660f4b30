"""The learning rate as a pure function of the position in training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A rate that is multiplied by `factor` at every step.

    steps: update counts after which the rate falls, ascending: exactly `step` updates run at the old rate, as in
    mx.lr_scheduler.MultiFactorScheduler. base_lr: the rate at update `begin`; steps at or before `begin` are spent,
    so a rate set by hand when training is continued is the rate from there on, and later steps still apply to it.
    """

    base_lr: float
    steps: tuple[int, ...] = ()
    factor: float = 0.1
    begin: int = 0

    def lr_at(self, update: int) -> float:
        """The rate of the update that follows `update` completed ones (0 for the very first)."""
        passed = sum(self.begin < step <= update for step in self.steps)
        return self.base_lr * self.factor**passed


def make_schedule(
    base_lr: float, epoch_steps: tuple[int, ...], steps_per_epoch: int, factor: float, begin: int = 0
) -> Schedule:
    """A Schedule from steps counted in epochs (`epoch_steps`) and batches an epoch."""
    return Schedule(base_lr, tuple(step * steps_per_epoch for step in epoch_steps), factor, begin)
