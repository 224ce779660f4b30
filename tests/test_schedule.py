"""The learning rate against MXNet's own scheduler, and what a continued run sees of it."""

from __future__ import annotations

import pytest

from mxnet_compat import mx
from training.schedule import Schedule, make_schedule


def test_equals_mxnet_multi_factor_scheduler():
    ours = make_schedule(0.1, (2, 3), steps_per_epoch=5, factor=0.1)
    theirs = mx.lr_scheduler.MultiFactorScheduler(step=[10, 15], factor=0.1, base_lr=0.1)
    # MXNet counts the update that is being made, from 1.
    assert [ours.lr_at(update) for update in range(20)] == pytest.approx([theirs(n) for n in range(1, 21)])


def test_exactly_step_updates_at_the_old_rate():
    schedule = Schedule(1.0, (3,), 0.5)
    assert [schedule.lr_at(update) for update in range(5)] == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_rate_given_by_hand_holds_from_there_and_later_steps_apply():
    schedule = Schedule(0.001, (3, 6), 0.1, begin=4)
    assert schedule.lr_at(4) == schedule.lr_at(5) == 0.001
    assert schedule.lr_at(6) == pytest.approx(0.0001)


def test_a_step_at_the_begin_is_spent():
    assert Schedule(0.01, (4,), 0.1, begin=4).lr_at(4) == 0.01
