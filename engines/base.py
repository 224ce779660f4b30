"""The contract between the training loop and the engines: what goes in, what comes out.

The loop owns epochs, learning rate, logging and checkpoints; an engine owns arithmetic. This module needs numpy
alone, so that the loader and the loop can use its types where no framework is installed.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from errors import ProjectError

# Label of a row that counts nowhere; the declared graphs end in SoftmaxOutput(use_ignore=True, ignore_label=-1).
IGNORED_LABEL = -1
# The loss of a row is -log(p + LOSS_FLOOR), p the probability of its label: the smallest normal float32, so that a
# probability that underflowed to 0 costs 87.3 nats instead of an infinity, and NaN stays NaN.
LOSS_FLOOR = float(np.finfo(np.float32).tiny)
TOP_K = 5
# Linux counts a process's peak memory in these, macOS in bytes.
KIBIBYTE = 1024


class Batch(NamedTuple):
    """What the loader hands to an engine.

    images: uint8 (N, 3, H, W), RGB. labels: int64 (N,). pad: number of rows at the end that only fill the batch;
    they repeat earlier rows and count nowhere, neither in the loss nor in the metrics.
    """

    images: np.ndarray
    labels: np.ndarray
    pad: int = 0

    @property
    def valid(self) -> int:
        """Rows that count."""
        return len(self.labels) - self.pad


@dataclass
class Metrics:
    """Sums over images, so that batches of any size add up; rates are computed only when read."""

    count: int = 0
    loss_sum: float = 0.0
    top1_sum: int = 0
    top5_sum: int = 0

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(
            self.count + other.count,
            self.loss_sum + other.loss_sum,
            self.top1_sum + other.top1_sum,
            self.top5_sum + other.top5_sum,
        )

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats; NaN when nothing was counted."""
        return self.loss_sum / self.count if self.count else float("nan")

    @property
    def top1(self) -> float:
        """Fraction of images whose label is the most likely class."""
        return self.top1_sum / self.count if self.count else float("nan")

    @property
    def top5(self) -> float:
        """Fraction of images whose label is among the five most likely classes (all of them when fewer)."""
        return self.top5_sum / self.count if self.count else float("nan")

    def rates(self) -> dict[str, float]:
        """Loss, top-1 and top-5 by name."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}


class NonFiniteLoss(ProjectError):
    """The loss of a batch became NaN or infinite; `offset` counts batches since the last read_metrics()."""

    def __init__(self, offset: int, loss: float):
        super().__init__(f"the loss became {loss} in batch {offset} after the last report")
        self.offset = offset
        self.loss = loss


def sum_batches(rows: np.ndarray, counts: list[int]) -> Metrics:
    """Add up what an engine collected on its device since the last read.

    rows: float32 (batches, 3), a batch's summed loss in nats, its top-1 and its top-5 hits, padding left out.
    counts: images that counted, a batch each. The sums are float64: adding float32 numbers of like size is then
    exact, so an epoch that was interrupted and continued reports the same bits. Raises NonFiniteLoss.
    """
    if not counts:
        return Metrics()
    bad = np.flatnonzero(~np.isfinite(rows[:, 0]))
    if len(bad):
        raise NonFiniteLoss(int(bad[0]), float(rows[bad[0], 0]))
    loss, top1, top5 = rows.astype(np.float64).sum(axis=0)
    return Metrics(sum(counts), float(loss), int(top1), int(top5))


def even_shares(rows: int, devices: int) -> list[int]:
    """Rows of a batch that each device gets: as even as can be, the first ones get the rest.

    MXNet's own rule rounds, which leaves the last device with much more, or none (6 rows for 4 devices).
    """
    return [rows // devices + (index < rows % devices) for index in range(devices)]


def spread_padding(batch: Batch, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels (int64, padding rows IGNORED_LABEL) of a batch that is cut into `parts` by even_shares.

    The rows that count are shared by the parts as evenly as processes share them, and each part is filled up with
    repeats of its own; else the last parts would compute the statistics of their BatchNorms from padding alone.
    """
    labels = np.array(batch.labels, dtype=np.int64)
    labels[batch.valid :] = IGNORED_LABEL
    if parts == 1 or not batch.pad:
        return batch.images, labels
    rows, counted = [], []
    for part, share in zip(np.array_split(np.arange(batch.valid), parts), even_shares(len(labels), parts)):
        rows.append(np.resize(part if len(part) else [0], share))
        counted.append(np.arange(share) < len(part))
    order = np.concatenate(rows)
    return batch.images[order], np.where(np.concatenate(counted), batch.labels[order], IGNORED_LABEL)


@dataclass
class TrainState:
    """Everything an engine must be given to continue a run, as host arrays.

    params: "arg:NAME" and "aux:NAME" -> float32 array, in the order of the graph's list_arguments(), then
    list_auxiliary_states(). optimizer: "SLOT:NAME" -> array, SLOT being "momentum" (sgd, nag) or "mean" and
    "variance" (adam), NAME a parameter's name without prefix. updates: number of optimizer updates done.
    loss_scale: for float16, what gradients are scaled with and the updates since that last changed; None for
    other precisions.
    """

    params: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    updates: int = 0
    loss_scale: tuple[float, int] | None = None


def peak_process_memory() -> int:
    """Bytes of main memory that this process held at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


class Engine(Protocol):
    """What the training loop asks of an engine."""

    def train_batch(self, batch: Batch, lr: float, total: int | None = None) -> None:
        """Forward, backward and one update with learning rate `lr`; metrics stay on the device.

        total: rows that count in the batches of all processes that train together (default: this batch's own)."""

    def predict(self, batch: Batch) -> np.ndarray:
        """Class probabilities in inference mode, float32 (N, classes), padding rows included."""

    def read_metrics(self) -> Metrics:
        """Training metrics summed since the last call; the only call that waits for all of them.

        Raises NonFiniteLoss when a batch's loss was NaN or infinite."""

    def get_state(self) -> TrainState:
        """Parameters, auxiliary states and optimizer state as host arrays (waits for the device).

        Where several processes train together all of them must ask; moving statistics are averaged over them."""

    def set_state(self, state: TrainState) -> None:
        """Continue from `state`; an empty `optimizer` dictionary means fresh optimizer state."""

    def peak_memory(self) -> int:
        """Bytes of memory that training needed at most so far: on the fullest GPU, or of this process on CPUs."""

    def close(self) -> None:
        """Release devices, threads and processes."""
