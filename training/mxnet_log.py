"""Reader of the text that MXNet's `Module.fit` and `FeedForward.fit` log: old runs compared with ours.

Lines with figures, behind any prefix (`INFO:root:`, a time, a logger's name), with tabs or blanks between:

    Namespace(batch_size=192, lr=0.1, ...)                                  as the original code prints them
    Epoch[3] Batch [50] Speed: 123.4 samples/sec Train-accuracy=0.41 ...    MXNet before 1.0
    Epoch[3] Batch [0-50] Speed: 123.4 samples/sec accuracy=0.41 ...        MXNet 1.x
    Update[5005]: Change learning rate to 1.00000e-02
    Epoch[3] Train-accuracy=0.52
    Epoch[3] Time cost=728.3
    Epoch[3] Validation-accuracy=0.46

MXNet counts epochs from 0 and names the one that runs; here an epoch's number says how many are completed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_NUMBER = r"[-+]?(?:nan|inf|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
_EPOCH = re.compile(r"(?:\b(?:Epoch|Iter)\s?\[(\d{1,9})\]|\[Epoch (\d{1,9})\])(.*)")
_BATCH = re.compile(r"\s+Batch\s*\[(?:(\d{1,9})-)?(\d{1,9})\]")
_SPEED = re.compile(rf"Speed:\s*({_NUMBER})")
_TIME_COST = re.compile(rf"Time cost=({_NUMBER})")
_METRIC = re.compile(rf"(?:\b(Train|Validation)-)?\b([a-zA-Z][\w-]*)=({_NUMBER})")
_RATE = re.compile(rf"learning rate (?:to|arrived at) ({_NUMBER})")
_ARGUMENTS = re.compile(r"Namespace\(.*\)")

_METRIC_NAMES = {
    "accuracy": "top1",
    "acc": "top1",
    "top_k_accuracy_5": "top5",
    "top_k_acc_5": "top5",
    "cross-entropy": "loss",
    "ce": "loss",
    "nll-loss": "loss",
    "loss": "loss",
}


@dataclass
class _Epoch:
    """What the lines of one epoch said so far."""

    train: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    # metric -> [(first batch, last batch, mean over them)] from the batch lines
    windows: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    seconds: float | None = None
    lr: float | None = None
    last_batch: int = 0
    finished: bool = False

    def train_rates(self) -> dict[str, float | None]:
        """Figures of the whole epoch: as logged at its end, or else the mean over its batch lines."""
        rates: dict[str, float | None] = {}
        for name in ("loss", "top1", "top5"):
            windows = self.windows.get(name)
            if name in self.train:
                rates[name] = self.train[name]
            elif windows:
                batches = sum(last - first for first, last, _ in windows)
                rates[name] = sum((last - first) * mean for first, last, mean in windows) / batches
            else:
                rates[name] = None
        return rates


class _LogReader:
    """Collects lines; a restarted log goes back to an earlier epoch, and what it says from there on wins."""

    def __init__(self) -> None:
        self.arguments: dict[str, object] = {}
        self.epochs: dict[int, _Epoch] = {}
        self.train_records: list[dict] = []
        self.lr: float | None = None

    def take(self, line: str) -> None:
        """Read one line; one without figures is passed over."""
        arguments = _ARGUMENTS.search(line)
        rate = _RATE.search(line)
        epoch = _EPOCH.search(line)
        if arguments:
            self.arguments = parse_namespace(arguments[0])
            self.lr = self.arguments.get("lr", self.lr)
        elif rate:
            self.lr = float(rate[1])
        elif epoch:
            self._take_epoch_line(int(epoch[1] or epoch[2]) + 1, epoch[3])

    def _take_epoch_line(self, number: int, text: str) -> None:
        batch = _BATCH.match(text)
        if max(self.epochs, default=0) > number:
            self._forget_from(number + 1)
        known = self.epochs.get(number)
        if batch and known and (known.finished or int(batch[2]) < known.last_batch):
            self._forget_from(number)
        epoch = self.epochs.setdefault(number, _Epoch())
        epoch.lr = self.lr
        if batch:
            first = None if batch[1] is None else int(batch[1])
            self._take_batch_line(number, first, int(batch[2]), text[batch.end() :])
            return
        cost = _TIME_COST.search(text)
        if cost:
            epoch.seconds = float(cost[1])
            epoch.finished = True
        for part, name, value in _METRIC.findall(text):
            if part and name in _METRIC_NAMES:
                getattr(epoch, part.lower())[_METRIC_NAMES[name]] = float(value)
                epoch.finished = True

    def _take_batch_line(self, number: int, first: int | None, last: int, text: str) -> None:
        epoch = self.epochs[number]
        epoch.last_batch = last
        record = {"type": "train", "epoch": number, "batch": last, "lr": self.lr}
        speed = _SPEED.search(text)
        if speed:
            record["images_per_second"] = float(speed[1])
            epoch.speeds.append(float(speed[1]))
        for _, name, value in _METRIC.findall(text):
            if name not in _METRIC_NAMES:
                continue
            metric = _METRIC_NAMES[name]
            windows = epoch.windows.setdefault(metric, [])
            begin = first if first is not None else (windows[-1][1] if windows else 0)
            # A window that begins where an earlier one began is a running mean and takes its place.
            windows[:] = [window for window in windows if window[0] < begin]
            windows.append((begin, max(last, begin + 1), float(value)))
            record[metric] = float(value)
        self.train_records.append(record)

    def _forget_from(self, number: int) -> None:
        self.epochs = {key: epoch for key, epoch in self.epochs.items() if key < number}
        self.train_records = [record for record in self.train_records if record["epoch"] < number]

    def records(self) -> list[dict]:
        """The log in the form of a run.jsonl; an epoch that was not finished has train records only."""
        records: list[dict] = []
        if self.arguments:
            records.append({"type": "header", "arguments": self.arguments, **_sizes(self.arguments)})
        records += self.train_records
        per_epoch = self.arguments.get("num_examples")
        elapsed = 0.0
        last = max(self.epochs, default=0)
        for number, epoch in sorted(self.epochs.items()):
            if number == last and not epoch.finished:
                break
            # Time is known as long as every epoch so far told its cost.
            elapsed = elapsed + epoch.seconds if elapsed is not None and epoch.seconds is not None else None
            records.append(
                {
                    "type": "epoch",
                    "epoch": number,
                    "images": number * per_epoch if isinstance(per_epoch, int) else None,
                    "lr": epoch.lr,
                    "train": epoch.train_rates(),
                    "validation": epoch.validation or None,
                    "images_per_second": _mean_speed(epoch.speeds),
                    "seconds": epoch.seconds,
                    "elapsed": elapsed,
                }
            )
        return records


def read_text_log(lines: Iterable[str]) -> list[dict]:
    """The figures in MXNet's log text as records of a run.jsonl (header, train, epoch); empty without any.

    Training figures of an epoch are those logged at its end (`Epoch[3] Train-...`), or the mean over its
    batch lines. A log that was continued after a restart goes on from the epoch that the restart began
    with. elapsed adds up the time costs, which leave validation out.
    """
    reader = _LogReader()
    for line in lines:
        reader.take(line)
    return reader.records()


def parse_namespace(text: str) -> dict[str, object]:
    """Arguments in a printed `argparse.Namespace(...)`; empty when the text is none.

    A value that is no Python literal stays text.
    """
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return {}
    if not isinstance(call, ast.Call):
        return {}
    values: dict[str, object] = {}
    for keyword in call.keywords:
        try:
            values[keyword.arg or ""] = ast.literal_eval(keyword.value)
        except ValueError:
            values[keyword.arg or ""] = ast.unparse(keyword.value)
    return values


def _sizes(arguments: dict[str, object]) -> dict[str, object]:
    known = {"train_images": arguments.get("num_examples"), "classes": arguments.get("num_classes")}
    return {name: value for name, value in known.items() if value is not None}


def _mean_speed(speeds: list[float]) -> float | None:
    """Harmonic mean, as the speeds are of equal numbers of images; without infinite ones (a coarse clock)."""
    finite = [speed for speed in speeds if 0 < speed < float("inf")]
    return len(finite) / sum(1 / speed for speed in finite) if finite else None
