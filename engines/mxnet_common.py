"""What the two MXNet engines share: metrics on the device, optimizer state by parameter name, seeds, padding rows."""

from __future__ import annotations

import json

import numpy as np

from engines.base import LOSS_FLOOR, TOP_K, Batch, Metrics, peak_process_memory, spread_padding, sum_batches
from mxnet_compat import mx

DATA_NAME, LABEL_NAME = "data", "softmax_label"
# Batches that may wait in MXNet's queue while another is computed.
BATCHES_AHEAD = 2
# Names of the arrays that an MXNet optimizer keeps for a parameter, in MXNet's order.
STATE_SLOTS = {"nag": ("momentum",), "sgd": ("momentum",), "adam": ("mean", "variance")}

# Where an optimizer keeps the state of a parameter: an updater of MXNet's and the key in it; one for every device
# that updates on its own.
Places = dict[str, list[tuple["mx.optimizer.Updater", object]]]


def optimizer_arguments(optimizer: str, momentum: float, wd: float) -> dict[str, float]:
    """Arguments of MXNet's optimizer; adam has no momentum."""
    return {"wd": wd} if optimizer == "adam" else {"wd": wd, "momentum": momentum}


def state_slots(optimizer: str, momentum: float) -> tuple[str, ...]:
    """Arrays that the optimizer keeps for a parameter; sgd and nag without momentum keep none."""
    return () if optimizer != "adam" and momentum == 0.0 else STATE_SLOTS[optimizer]


def read_optimizer(places: Places, slots: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Optimizer state as "SLOT:NAME" -> array; parameters that were never updated have none."""
    arrays = {}
    for name, ((updater, key), *_) in places.items():
        if slots and key in updater.states:
            state = updater.states[key]
            for slot, array in zip(slots, state if isinstance(state, tuple) else (state,)):
                arrays[f"{slot}:{name}"] = array.asnumpy()
    return arrays


def write_optimizer(places: Places, slots: tuple[str, ...], arrays: dict[str, np.ndarray]) -> None:
    """Put saved optimizer state where MXNet's updaters look for it; a parameter without starts from zeros."""
    for name, updaters in places.items():
        if not slots or f"{slots[0]}:{name}" not in arrays:
            continue
        values = [arrays[f"{slot}:{name}"] for slot in slots]
        for updater, key in updaters:
            state = tuple(mx.nd.array(value, dtype=value.dtype) for value in values)
            updater.states[key] = state if len(state) > 1 else state[0]
            # Not yet where its weight is: the updater moves it there before the first use.
            updater.states_synced[key] = False


def draws_random_numbers(symbol: mx.sym.Symbol) -> bool:
    """Whether training the graph draws random numbers; only dropout does."""
    return any(node["op"] == "Dropout" for node in json.loads(symbol.tojson())["nodes"])


def seed_update(seed: int, update: int, rank: int = 0) -> None:
    """Seed MXNet's generators from (seed, update, rank), so that a continued run draws the same numbers.

    From the one number MXNet makes a different one for every device.
    """
    entropy = (seed, update, rank) if rank else (seed, update)
    mx.random.seed(int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1))


def device_images(batch: Batch) -> mx.nd.NDArray:
    """Images as float32, 0-255."""
    return mx.nd.array(batch.images, dtype="float32")


def training_rows(batch: Batch, devices: int) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
    """Images as float32, 0-255, and labels as float32 (N,), in the order in which devices take them."""
    images, labels = spread_padding(batch, devices)
    return mx.nd.array(images, dtype="float32"), mx.nd.array(labels, dtype="float32")


def peak_memory(contexts: list[mx.Context]) -> int:
    """Bytes, see engines.base.Engine. What MXNet's pool has taken on a GPU it keeps, so what is in use is the peak."""
    gpus = [context.device_id for context in contexts if context.device_type == "gpu"]
    in_use = [total - free for free, total in map(mx.context.gpu_memory_info, gpus)]
    return max(in_use) if in_use else peak_process_memory()


class DeviceMetrics:
    """Metrics of training batches, kept on the devices until they are read."""

    def __init__(self) -> None:
        self._rows: list[mx.nd.NDArray] = []
        self._counts: list[int] = []

    def add(self, probabilities: mx.nd.NDArray, labels: mx.nd.NDArray, count: int) -> None:
        """One batch: (N, classes) probabilities, N labels, of which `count` are not IGNORED_LABEL."""
        self._rows.append(batch_sums(probabilities, labels))
        self._counts.append(count)
        if len(self._rows) > BATCHES_AHEAD:
            # MXNet queues without a bound: batches would pile up in memory, and a signal would wait for all of them.
            self._rows[-1 - BATCHES_AHEAD].wait_to_read()

    def read(self) -> Metrics:
        """Sums since the last read; waits for the devices. Raises NonFiniteLoss."""
        rows, counts = self._rows, self._counts
        self._rows, self._counts = [], []
        return sum_batches(mx.nd.stack(*rows).asnumpy() if rows else np.empty((0, 3), np.float32), counts)


def batch_sums(probabilities: mx.nd.NDArray, labels: mx.nd.NDArray) -> mx.nd.NDArray:
    """(3,): summed loss, top-1 and top-5 hits of a batch, on the device; rows labelled -1 count nowhere.

    The definition is that of training.metrics.batch_metrics.
    """
    labels = labels.as_in_context(probabilities.context)
    counted = labels >= 0
    own = mx.nd.pick(probabilities, mx.nd.maximum(labels, 0), axis=1, keepdims=True)
    classes = mx.nd.arange(probabilities.shape[1], ctx=probabilities.context).expand_dims(0)
    earlier = mx.nd.broadcast_lesser(classes, labels.expand_dims(1))
    before = mx.nd.broadcast_greater(probabilities, own) + mx.nd.broadcast_equal(probabilities, own) * earlier
    rank = before.sum(axis=1)
    loss = -mx.nd.log(own.reshape((-1,)) + LOSS_FLOOR)
    return mx.nd.stack(loss * counted, (rank < 1) * counted, (rank < TOP_K) * counted).sum(axis=1)
