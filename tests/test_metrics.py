"""Loss and hits by hand-computed examples, and the sums that engines hand over."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.base import Metrics, NonFiniteLoss, sum_batches
from training.metrics import batch_metrics


def test_batch_metrics_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1, 0, 0, 0], [0.3, 0.25, 0.2, 0.1, 0.1, 0.05]], np.float32)
    metrics = batch_metrics(probabilities, np.array([0, 5]))
    assert (metrics.count, metrics.top1_sum, metrics.top5_sum) == (2, 1, 1)
    assert metrics.loss_sum == pytest.approx(-math.log(0.7) - math.log(0.05), rel=1e-6)


def test_constant_prediction_is_not_right_everywhere():
    probabilities = np.full((10, 10), 0.1, np.float32)
    metrics = batch_metrics(probabilities, np.arange(10))
    assert (metrics.top1_sum, metrics.top5_sum) == (1, 5)


def test_probability_that_underflowed_costs_a_finite_loss():
    metrics = batch_metrics(np.array([[1.0, 0.0]], np.float32), np.array([1]))
    assert metrics.loss_sum == pytest.approx(87.336, abs=1e-2)


def test_sums_do_not_depend_on_where_they_were_read():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.uniform(1, 500, 60), rng.integers(0, 9, 60), rng.integers(0, 9, 60)], 1).astype(np.float32)
    whole = sum_batches(rows, [64] * 60)
    parts = sum_batches(rows[:17], [64] * 17) + sum_batches(rows[17:41], [64] * 24) + sum_batches(rows[41:], [64] * 19)
    assert whole == parts


def test_non_finite_loss_names_the_batch():
    rows = np.ones((4, 3), np.float32)
    rows[2, 0] = np.nan
    with pytest.raises(NonFiniteLoss) as caught:
        sum_batches(rows, [1] * 4)
    assert caught.value.offset == 2


def test_nothing_counted_reads_as_nan():
    assert math.isnan(Metrics().loss)
    assert math.isnan(Metrics().top1)
