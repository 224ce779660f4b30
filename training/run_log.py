"""The log of a training run: `run.jsonl` for programs, `train.log` for people, and the reader of both kinds.

`run.jsonl` holds one JSON object a line, told apart by its "type":

    header  time, arguments, versions, network, engine, parameters, multiply_adds, classes, train_images,
            val_images, steps_per_epoch
    train   epoch (from 1), batch (done in the epoch), update, images (seen in all), loss, top1, top5, lr,
            images_per_second, data_wait, elapsed
    epoch   epoch (completed), update, images, lr, train {loss, top1, top5}, validation (the same, or null),
            images_per_second, data_wait, seconds (of this epoch), peak_memory, elapsed

loss is a mean cross entropy in nats, top1 and top5 are fractions of images that are right, data_wait is the
fraction of time spent waiting for the loader, peak_memory the most bytes that were in use since the process
started (on the fullest GPU, or main memory; of the first of several processes), elapsed counts seconds of training
over all resumed parts. A figure that is not finite (a diverged loss) is null. A resumed run continues its file:
lines beyond the checkpoint are cut.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from atomic_file import write_bytes
from engines.base import Metrics
from errors import ProjectError, UsageError
from training.mxnet_log import read_text_log
from training.process_lock import ProcessLock
from training.progress import describe, say

RUN_FILE = "run.jsonl"
TEXT_FILE = "train.log"
RECORD_TYPES = ("header", "train", "epoch")
_STEMS = tuple(os.path.splitext(name) for name in (RUN_FILE, TEXT_FILE))


class LogLock(ProcessLock):
    """Context manager that a run holds while it writes in `log_dir`; UsageError when another run does."""

    def __init__(self, log_dir: str | Path) -> None:
        super().__init__(Path(log_dir) / "run.lock", "another --log-dir")


class RunLog:
    """Writes a run's two logs. Once it is open, no failing write ends the training: it is warned of once.

    Args:
        log_dir: folder for both files; made when missing.
        resume: (completed epochs, batches after them) of the checkpoint that the run continues from. Lines of
            later batches or epochs and a torn last line are cut, and the header stays. Updates do not tell what is
            later: with another batch size an epoch has another number of them. None starts afresh: the files of
            an earlier run in the same folder are kept as `run-1.jsonl`, `train-1.log` (the next free number).

    Raises:
        UsageError: the folder cannot be made or written to.
    """

    def __init__(self, log_dir: str | Path, resume: tuple[int, int] | None = None) -> None:
        self.folder = Path(log_dir)
        self.path = self.folder / RUN_FILE
        self.text_path = self.folder / TEXT_FILE
        self._warned = False
        self._has_header = False
        self._steps_per_epoch: int | None = None
        self._elapsed_before = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume is None:
                self._set_aside_old_files()
            else:
                self._cut_after(*resume)
            self.text_path.open("ab").close()
        except OSError as error:
            cause = error.strerror or error
            raise UsageError(f"cannot write logs in {self.folder}: {cause}; change --log-dir") from error
        self._started = time.monotonic()
        if resume is not None:
            self.message(f"resumed after epoch {resume[0]}, batch {resume[1]} of the next", echo=False)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, the parts before a resume included."""
        return round(self._elapsed_before + time.monotonic() - self._started, 3)

    def header(
        self,
        *,
        arguments: Mapping[str, object],
        versions: Mapping[str, str],
        network: str,
        engine: str,
        parameters: int,
        multiply_adds: int | None,
        classes: int,
        train_images: int,
        val_images: int,
        steps_per_epoch: int,
    ) -> None:
        """Describe the run. A resumed run whose file has a header keeps that one."""
        self._steps_per_epoch = steps_per_epoch
        record = {
            "type": "header",
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "arguments": dict(arguments),
            "versions": dict(versions),
            "network": network,
            "engine": engine,
            "parameters": parameters,
            "multiply_adds": multiply_adds,
            "classes": classes,
            "train_images": train_images,
            "val_images": val_images,
            "steps_per_epoch": steps_per_epoch,
        }
        if not self._has_header:
            self._write_record(record)
            self._has_header = True
        given = " ".join(f"{name}={value}" for name, value in arguments.items())
        self.message(f"{network}, engine {engine}, {parameters:,} parameters, {classes} classes", echo=False)
        self.message(f"arguments: {given}", echo=False)

    def train(
        self,
        *,
        epoch: int,
        batch: int,
        update: int,
        images: int,
        metrics: Metrics,
        lr: float,
        images_per_second: float,
        data_wait: float,
    ) -> None:
        """Log an interval of training: `metrics` are of the batches since the last train line."""
        record = {"type": "train", "epoch": epoch, "batch": batch, "update": update, "images": images}
        record.update(metrics.rates())
        record.update(lr=lr, images_per_second=images_per_second, data_wait=data_wait, elapsed=self.elapsed)
        self._write_record(record)
        of_steps = f"/{self._steps_per_epoch}" if self._steps_per_epoch else ""
        figures = describe(metrics, lr, images_per_second, data_wait)
        self.message(f"epoch {epoch} batch {batch}{of_steps}: {figures}", echo=False)

    def epoch(
        self,
        *,
        epoch: int,
        update: int,
        images: int,
        lr: float,
        train: Metrics,
        validation: Metrics | None,
        images_per_second: float,
        data_wait: float,
        seconds: float,
        peak_memory: int,
    ) -> None:
        """Log the end of an epoch.

        lr: rate of its last update. seconds: the epoch, validation included. peak_memory: bytes.
        """
        record = {"type": "epoch", "epoch": epoch, "update": update, "images": images, "lr": lr}
        record.update(train=train.rates(), validation=None if validation is None else validation.rates())
        record.update(images_per_second=images_per_second, data_wait=data_wait, seconds=seconds)
        record.update(peak_memory=peak_memory, elapsed=self.elapsed)
        self._write_record(record)
        figures = f"{describe(train, lr, images_per_second, data_wait)}; peak memory {peak_memory / 1e6:,.0f} MB"
        self.message(f"epoch {epoch} done in {seconds:.1f} s: train {figures}", echo=False)
        if validation is not None:
            rates = f"loss {validation.loss:.4f}, top-1 {validation.top1:.2%}, top-5 {validation.top5:.2%}"
            self.message(f"epoch {epoch} validation: {rates}", echo=False)

    def message(self, text: str, *, echo: bool = True) -> None:
        """A line for people: into `train.log` with the time before it and, with `echo`, onto the screen."""
        if echo:
            say(text)
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        self._append(self.text_path, f"{stamp} {text}\n")

    def _write_record(self, record: dict) -> None:
        self._append(self.path, json.dumps(_plain(record), allow_nan=False) + "\n")

    def _append(self, path: Path, text: str) -> None:
        try:
            _append_whole(path, text.encode("utf-8"))
        except OSError as error:
            if not self._warned:
                self._warned = True
                cause = error.strerror or error
                say(f"warning: cannot write {path} ({cause}); the training goes on, lines of its log are lost")

    def _set_aside_old_files(self) -> None:
        if not self.path.exists():
            return
        number = 1
        while any((self.folder / f"{stem}-{number}{suffix}").exists() for stem, suffix in _STEMS):
            number += 1
        for stem, suffix in _STEMS:
            old = self.folder / f"{stem}{suffix}"
            if old.exists():
                old.rename(self.folder / f"{stem}-{number}{suffix}")

    def _cut_after(self, epoch: int, batch: int) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept: list[bytes] = []
        for line, record in _whole_lines(content):
            if record["type"] == "header":
                if self._has_header:
                    continue
                self._has_header = True
            elif record["type"] == "epoch" and record["epoch"] > epoch:
                # Perhaps of the batch reached: a checkpoint may come after an epoch's last one, before its validation.
                continue
            elif record["type"] == "train" and (record["epoch"] - 1, number(record.get("batch"))) > (epoch, batch):
                continue
            else:
                self._elapsed_before = record.get("elapsed") or self._elapsed_before
            kept.append(line)
        write_bytes(self.path, b"".join(kept))


class NoLog:
    """The log of a process that somebody else speaks for."""

    def _ignore(self, *_: object, **__: object) -> None:
        pass

    header = train = epoch = message = _ignore


def _plain(value: object) -> object:
    """`value` in JSON's own types: numpy scalars unwrapped, paths as text, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _append_whole(path: Path, line: bytes) -> None:
    """Append all of `line` or nothing; opening the file anew each time notices a folder that went away."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        written = 0
        try:
            written = os.write(handle, line)
            if written < len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def _whole_lines(content: bytes) -> Iterator[tuple[bytes, dict]]:
    """Lines of a run.jsonl, each with the object in it; a torn or foreign line is left out."""
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or record.get("type") not in RECORD_TYPES:
            continue
        if record["type"] == "header" or all(isinstance(record.get(key), int) for key in ("epoch", "update")):
            yield line + b"\n", record


def number(value: object) -> float:
    """A logged figure; NaN for what is no number that a curve could show."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


@dataclass
class Run:
    """A run as its log tells it.

    header: arguments, versions, sizes; what the log does not tell is missing. train: the train lines.
    epochs: one epoch line a finished epoch, in order. Both are dictionaries as the module's docstring
    describes; a log of MXNet's fit has no update, and images only where it prints its arguments.
    """

    name: str
    path: Path
    header: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)
    epochs: list[dict] = field(default_factory=list)

    def values(self, metric: str, part: str | None = None) -> list[float]:
        """A figure of every epoch, such as ("lr") or ("top1", "validation"); NaN where the log has none."""
        rows = [row.get(part) if part else row for row in self.epochs]
        values = [row.get(metric) if isinstance(row, Mapping) else None for row in rows]
        return [number(value) for value in values]

    def best_epoch(self) -> tuple[int, float] | None:
        """(epoch, accuracy) of the best top-1 on validation, or on training where there is no validation."""
        for part in ("validation", "train"):
            scored = [
                (value, -row["epoch"])
                for value, row in zip(self.values("top1", part), self.epochs)
                if not math.isnan(value)
            ]
            if scored:
                value, negative_epoch = max(scored)
                return -negative_epoch, value
        return None


def read_run(path: str | Path) -> Run:
    """Read a run from a `run.jsonl`, the folder that holds it, or a text log of MXNet's `fit`.

    Raises:
        ProjectError: the file cannot be read, is no log of a training, or has no finished epoch yet.
    """
    path = Path(path)
    file = path / RUN_FILE if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ProjectError(f"{file}: {error.strerror or error}") from error
    if content.lstrip()[:1] == b"{":
        records = [record for _, record in _whole_lines(content)]
    else:
        records = read_text_log(content.decode("utf-8", errors="replace").splitlines())
    if file.name == TEXT_FILE and (file.parent / RUN_FILE).exists():
        raise ProjectError(f"{file}: is the log for people; name {file.parent / RUN_FILE}")
    if not records:
        raise ProjectError(f"{file}: holds no lines of a training log (a run.jsonl, or the log text of MXNet's fit)")
    header = next((record for record in records if record["type"] == "header"), {})
    # Of two lines for one epoch the later is the one that the run went on from.
    epochs = {record["epoch"]: record for record in records if record["type"] == "epoch"}
    if not epochs:
        raise ProjectError(f"{file}: no epoch is finished yet")
    return Run(
        name=file.resolve().parent.name if file.name == RUN_FILE else file.stem,
        path=file,
        header=header,
        train=[record for record in records if record["type"] == "train"],
        epochs=[epochs[number] for number in sorted(epochs)],
    )
