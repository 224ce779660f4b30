"""The training loop: epochs, rate, log and checkpoints; the arithmetic is the engine's."""

from __future__ import annotations

import argparse
import os
import signal
import time

from engines.base import Engine, Metrics, NonFiniteLoss
from engines.group import Group
from errors import ProjectError
from training.checkpoint import CheckpointError
from training.data import Data
from training.heartbeat import Heartbeat
from training.launch_processes import SIGNAL_EXIT_BASE
from training.metrics import batch_metrics
from training.position import Position
from training.progress import EpochProgress, Nowhere
from training.run_log import RunLog
from training.saving import Saver
from training.schedule import Schedule


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads; a SIGINT after that ends the process at once.

    A SIGTERM after that says nothing new, see `launch_processes.ended_at_once`.

    signal: what this process got. agreed: what the processes of the group know of together, so that they stop after
    the same batch.
    """

    def __init__(self, group: Group) -> None:
        self.signal: int | None = None
        self.agreed: int | None = None
        self._group = group
        self._previous: dict = {}

    def share(self, rows: int = 0) -> int:
        """Make a signal that any process got known to all; returns the sum of all processes' `rows` on the way."""
        if not self._group.lockstep:
            self.agreed = self.signal
            return rows
        total, signals, numbers = self._group.sum([rows, self.signal is not None, self.signal or 0])
        if signals:
            self.agreed = int(numbers / signals)
        return int(total)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            os._exit(SIGNAL_EXIT_BASE + number)

    @property
    def exit_status(self) -> int:
        """128 + signal as shells report it, or 0 when none came."""
        return SIGNAL_EXIT_BASE + self.agreed if self.agreed else 0


class _Window:
    """Times the batches between two train lines. images: seen so far; waited: loader.wait_seconds so far."""

    def __init__(self, images: int, waited: float):
        self._started, self._images, self._waited = time.monotonic(), images, waited

    def figures(self, images: int, waited: float) -> tuple[float, float]:
        """Images/s and the fraction of the time spent waiting for data since the window was opened."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (images - self._images) / seconds, min((waited - self._waited) / seconds, 1.0)


class Trainer:
    """Runs epochs from a position to the end, or until a signal.

    args: epochs in all; frequent, batches between two train lines; save_every, updates between two saves inside an
    epoch (0 for none). group: the processes that train together; the first one logs and saves.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        data: Data,
        log: RunLog,
        saver: Saver,
        args: argparse.Namespace,
        group: Group,
    ):
        self.engine = engine
        self.group = group
        self.heartbeat = Heartbeat(group.rank)
        self.schedule = schedule
        self.train_loader = data.train
        self.val_loader = data.validation
        self.log = log
        self.saver = saver
        self.epochs = args.epochs
        self.frequent = args.frequent
        self.save_every = args.save_every
        self._first_unread = 1  # number of the first batch whose metrics are still on the device
        self._unsaved = False  # whether the last save failed

    def run(self, position: Position) -> int:
        """Train until `epochs` epochs are complete; returns the exit status (0, or 128 + signal).

        Raises CheckpointError at the end when the last checkpoint could not be saved.
        """
        with StopRequest(self.group) as stop:
            while position.epoch < self.epochs and not stop.agreed:
                self._run_epoch(position, stop)
                stop.share()
            if stop.agreed:
                name = signal.Signals(stop.agreed).name
                self.log.message(
                    f"{name}: stopped at epoch {position.epoch + 1}, batch {position.batch}; --resume goes on"
                )
            if self._unsaved:
                raise CheckpointError("training has ended, but its last checkpoint could not be saved (see above)")
            return stop.exit_status

    def _run_epoch(self, position: Position, stop: StopRequest) -> None:
        started = time.monotonic()
        window = _Window(position.images, self.train_loader.wait_seconds)
        self._train_batches(position, stop)
        if position.batch < self.train_loader.steps_per_epoch or stop.agreed:
            self._save_running(position)
            return
        rate, data_wait = window.figures(position.images, self.train_loader.wait_seconds)
        validation = self._validate(stop) if self.val_loader else None
        if stop.agreed:
            self._save_running(position)
            return
        train, position.epoch_sums = position.epoch_sums, Metrics()
        if not self.group.lockstep:
            train = self.group.sum_metrics(train)
        position.epoch, position.batch = position.epoch + 1, 0
        score = {"epoch": position.epoch, "top1": (validation or train).top1}
        is_best = position.best is None or score["top1"] > position.best["top1"]
        if is_best:
            position.best = score
        # The log line comes before the checkpoint: what a checkpoint holds is in the log, and what is in the log
        # beyond the checkpoint is cut on resume.
        update = self._updates(position)
        self.log.epoch(
            epoch=position.epoch, update=update, images=position.images, lr=self.schedule.lr_at(update - 1),
            train=train, validation=validation, images_per_second=rate, data_wait=data_wait,
            seconds=time.monotonic() - started, peak_memory=self.engine.peak_memory(),
        )  # fmt: skip
        self.log.message(_epoch_summary(position, train, validation, is_best))
        if self.train_loader.skipped:
            self.log.message(f"{self.train_loader.skipped} training images did not decode and were skipped so far")
        metrics = {"train": train.rates(), "validation": validation.rates() if validation else None}
        self._save(position, metrics, best=is_best)

    def _train_batches(self, position: Position, stop: StopRequest) -> None:
        """The rest of the running epoch, or as much of it as a signal leaves."""
        steps = self.train_loader.steps_per_epoch
        self._first_unread = position.batch + 1
        window = _Window(position.images, self.train_loader.wait_seconds)
        batches = self.train_loader.batches(position.epoch, start_batch=position.batch)
        file, first = (None if self.group.leads else Nowhere()), position.batch
        with EpochProgress(steps, position.epoch + 1, self.epochs, initial=position.batch, file=file) as progress:
            for batch in batches:
                lr = self.schedule.lr_at(self._updates(position))
                rows = stop.share(batch.valid)
                if stop.agreed and position.batch > first:
                    break
                if rows:
                    self.engine.train_batch(batch, lr, rows)
                self.heartbeat.beat()
                position.batch += 1
                position.images += rows
                if position.batch % self.frequent == 0 or position.batch == steps:
                    window = self._report(position, lr, window, progress)
                else:
                    progress.update(position.batch)
                if self.save_every and position.batch < steps and self._updates(position) % self.save_every == 0:
                    self._save_running(position)
        batches.close()
        stop.share()

    def _report(self, position: Position, lr: float, window: _Window, progress: EpochProgress) -> _Window:
        """Read the metrics of the batches since the last train line, log and show them."""
        self._read_metrics(position)
        metrics, position.window_sums = position.window_sums, Metrics()
        position.epoch_sums = position.epoch_sums + metrics
        rate, data_wait = window.figures(position.images, self.train_loader.wait_seconds)
        progress.update(position.batch, metrics, lr, rate, data_wait)
        self.log.train(
            epoch=position.epoch + 1, batch=position.batch, update=self._updates(position), images=position.images,
            metrics=metrics, lr=lr, images_per_second=rate, data_wait=data_wait,
        )  # fmt: skip
        return _Window(position.images, self.train_loader.wait_seconds)

    def _read_metrics(self, position: Position) -> None:
        """Move what the engines collected into the position; a loss that is not finite ends the run here."""
        if self.group.lockstep:
            sums = self.group.sum_metrics(self.group.attempt(lambda: self._own_metrics(position)))
        else:
            sums = self._own_metrics(position)
        position.window_sums = position.window_sums + sums
        self._first_unread = position.batch + 1

    def _own_metrics(self, position: Position) -> Metrics:
        """Sums of this process since the last read."""
        try:
            return self.engine.read_metrics()
        except NonFiniteLoss as error:
            number = self._first_unread + error.offset
            raise ProjectError(
                f"the loss became {error.loss} in epoch {position.epoch + 1}, batch {number}: training stops, the last "
                "checkpoint is untouched; lower --lr (or look at the data of that batch)"
            ) from None

    def _validate(self, stop: StopRequest) -> Metrics:
        """Metrics of the validation set, of which every process takes its part; of less when a signal came."""
        own = Metrics()
        batches = self.val_loader.batches(0)
        for batch in batches:
            stop.share()
            if stop.agreed:
                break
            probabilities = self.engine.predict(batch)[: batch.valid]
            own = own + batch_metrics(probabilities, batch.labels[: batch.valid])
            self.heartbeat.beat()
        batches.close()
        return self.group.sum_metrics(own)

    def _updates(self, position: Position) -> int:
        return position.epoch * self.train_loader.steps_per_epoch + position.batch

    def _save_running(self, position: Position) -> None:
        self._read_metrics(position)
        self._save(position)

    def _save(self, position: Position, metrics: dict | None = None, best: bool = False) -> None:
        """Save; a checkpoint that cannot be written is said so, and the training goes on."""
        state = self.engine.get_state()
        if not self.group.leads:
            return
        try:
            self.saver.save(position, state, metrics, best=best)
            self._unsaved = False
        except CheckpointError as error:
            self._unsaved = True
            self.log.message(f"warning: {error}; the training goes on, the last whole checkpoint is untouched")


def _epoch_summary(position: Position, train: Metrics, validation: Metrics | None, is_best: bool) -> str:
    text = f"epoch {position.epoch}: training loss {train.loss:.4f}, top-1 {train.top1:.2%}, top-5 {train.top5:.2%}"
    if validation:
        text += f"; validation loss {validation.loss:.4f}, top-1 {validation.top1:.2%}, top-5 {validation.top5:.2%}"
    return text + (" (best so far)" if is_best else "")
