"""Loss and accuracy of a batch of class probabilities, by the one definition that all engines share."""

from __future__ import annotations

import numpy as np

from engines.base import LOSS_FLOOR, TOP_K, Metrics


def batch_metrics(probabilities: np.ndarray, labels: np.ndarray) -> Metrics:
    """Metrics of (N, classes) probabilities against N labels; every row counts.

    A row is right in the top k when fewer than k classes are ranked before its label. Equal probabilities rank in
    class order, as argmax and a stable sort do, so a constant prediction is not counted as right everywhere.
    """
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    before = probabilities > own[:, None]
    tied = (probabilities == own[:, None]) & (np.arange(probabilities.shape[1]) < labels[:, None])
    rank = (before | tied).sum(axis=1)
    return Metrics(
        count=len(labels),
        loss_sum=float(-np.log(own.astype(np.float64) + LOSS_FLOOR).sum()),
        top1_sum=int((rank < 1).sum()),
        top5_sum=int((rank < TOP_K).sum()),
    )
