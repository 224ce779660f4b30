"""Where a run starts: from scratch, from other weights, or from a checkpoint of its own."""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import counted
from engines.base import TrainState
from errors import UsageError
from training.checkpoint import Checkpoint, check_params, find_latest, load_checkpoint
from training.heartbeat import job_start, restarted
from training.initializer import initial_state
from training.options import DEFAULT_LR
from training.position import Position
from training.saving import remove_checkpoints
from training.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from networks import Network

Shape = tuple
# What a checkpoint holds of an optimizer, by the flag's value; sgd and nag keep the same array.
SLOTS = {"sgd": {"momentum"}, "nag": {"momentum"}, "adam": {"mean", "variance"}}

# Flags that may differ when a run is continued without changing what it computes, or that are spoken of elsewhere.
FREE_FLAGS = {
    "resume", "retrain", "model_load_epoch", "model_load_prefix", "model_prefix", "overwrite", "log_dir", "frequent",
    "epochs", "lr", "lr_steps", "save_every", "keep", "data_threads", "data_dir", "max_restarts", "stall_timeout",
    "optimizer",
}  # fmt: skip


@dataclass
class Start:
    """A run's first state and position; a continued run knows its checkpoint. messages: what the user is told."""

    state: TrainState
    position: Position
    schedule: Schedule
    continued_from: Path | None = None
    messages: list[str] = field(default_factory=list)

    def finished(self, epochs: int) -> bool:
        """Whether a run of so many epochs has nothing left to train."""
        return self.position.epoch >= epochs


def choose_start(args: argparse.Namespace, network: Network, steps_per_epoch: int) -> Start:
    """Follow --resume, --retrain and --model-load-epoch; UsageError when that checkpoint cannot be used."""
    if restarted():
        # As the command that was given, but for what this job has saved since it began.
        checkpoint, passed_over = find_latest(args.model_prefix)
        messages = [f"passed over {path}: {reason}" for path, reason in passed_over]
        if checkpoint is not None and checkpoint.manifest and _saved_at(checkpoint.manifest) >= int(job_start()):
            return _continue(args, checkpoint, network.shapes, steps_per_epoch, messages)
    if args.resume:
        checkpoint, passed_over = find_latest(args.model_prefix)
        messages = [f"passed over {path}: {reason}" for path, reason in passed_over]
        if checkpoint is not None:
            return _continue(args, checkpoint, network.shapes, steps_per_epoch, messages)
        if passed_over and not args.overwrite:
            raise UsageError(
                f"nothing to resume from: {'; '.join(messages)}; --model-load-epoch N --retrain continues from "
                "parameters alone, --overwrite starts afresh"
            )
        messages.append(f"no checkpoint under {args.model_prefix} to resume from: starting from scratch")
        return _from_scratch(args, network, steps_per_epoch, messages)
    if args.model_load_epoch:
        checkpoint = load_checkpoint(args.model_load_prefix, args.model_load_epoch)
        if args.retrain:
            return _continue(args, checkpoint, network.shapes, steps_per_epoch, [])
        return _finetune(args, checkpoint, network, steps_per_epoch)
    _claim_prefix(args)
    return _from_scratch(args, network, steps_per_epoch, [])


def _saved_at(manifest: Mapping) -> float:
    """When a checkpoint was saved, seconds since 1970."""
    return datetime.strptime(manifest["saved"], "%Y-%m-%dT%H:%M:%S%z").timestamp()


def _from_scratch(args, network: Network, steps_per_epoch: int, messages: list[str]) -> Start:
    shapes = network.shapes
    state = initial_state(shapes, args.seed, network.initializers)
    fitting = {key: array for key, array in network.pretrained.items() if array.shape == tuple(shapes.get(key, ()))}
    state.params.update(fitting)
    if network.pretrained:
        messages.append(f"pretrained weights for {len(fitting)} of {len(shapes)} arrays, the others start anew")
    return Start(state, Position(), _schedule(args, steps_per_epoch, args.lr or DEFAULT_LR), messages=messages)


def _continue(args, checkpoint: Checkpoint, shapes, steps_per_epoch: int, messages: list[str]) -> Start:
    """Everything goes on as if the run had never stopped, as far as the checkpoint holds it."""
    check_params(shapes, checkpoint.state.params, checkpoint.path)
    manifest = checkpoint.manifest
    position = Position(epoch=checkpoint.epoch)
    if manifest is None:
        found = (
            "parameters and optimizer state are loaded"
            if checkpoint.state.optimizer
            else ("parameters are loaded, the optimizer starts with fresh state")
        )
        messages.append(f"{checkpoint.path.stem} has no manifest (another program wrote it): {found}")
    else:
        position = Position.from_dict(manifest["position"])
        if position.batch and manifest["steps_per_epoch"] != steps_per_epoch:
            raise UsageError(
                f"{checkpoint.path.stem} was saved inside an epoch of {manifest['steps_per_epoch']} batches, now an "
                f"epoch has {steps_per_epoch}: continue with the same --batch-size and data, or from an epoch's end "
                f"(--model-load-epoch {position.epoch} --retrain)"
            )
        messages += _changed_flags(args, manifest, checkpoint.path.stem)
    state = TrainState(checkpoint.state.params, dict(checkpoint.state.optimizer))
    state.updates, state.loss_scale = checkpoint.state.updates, checkpoint.state.loss_scale
    if manifest is None:
        state.updates = position.epoch * steps_per_epoch
    slots = {key.split(":", 1)[0] for key in state.optimizer}
    if slots and slots != SLOTS[args.optimizer]:
        messages.append(
            f"{checkpoint.path.stem} holds the state of another optimizer; {args.optimizer} starts with fresh state"
        )
        state.optimizer = {}
    update = position.epoch * steps_per_epoch + position.batch
    schedule = _continued_schedule(args, steps_per_epoch, manifest, update)
    start = Start(state, position, schedule, continued_from=checkpoint.path, messages=messages)
    if start.finished(args.epochs):
        text = f"{checkpoint.path.stem} has completed {counted(position.epoch, 'epoch')} and --epochs is {args.epochs}"
        if args.retrain:
            raise UsageError(f"{text}; raise it")
        messages.append(f"{text}: nothing is left to train; a larger --epochs goes on")
        return start
    messages.append(f"continuing from {checkpoint.path.stem}: epoch {position.epoch + 1}, batch {position.batch + 1}, "
                    f"rate {schedule.lr_at(update):g}")  # fmt: skip
    return start


def _changed_flags(args, manifest: dict, name: str) -> list[str]:
    """A message that lists the flags by which a run goes on otherwise than it began; none when there are none."""
    before, now = manifest.get("arguments", {}), json.loads(json.dumps(vars(args), default=str))
    changed = [
        f"--{key.replace('_', '-')} {before[key]} -> {value}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in FREE_FLAGS
    ]
    return [f"changed since {name}: {', '.join(changed)}"] if changed else []


def _finetune(args, checkpoint: Checkpoint, network: Network, steps_per_epoch: int) -> Start:
    """A fresh schedule on loaded weights; a classifier with another number of classes starts anew."""
    _claim_prefix(args)
    start = _from_scratch(args, network, steps_per_epoch, [])
    shapes, messages = network.shapes, start.messages
    loaded = dict(checkpoint.state.params)
    for name in _classifier_of_other_size(shapes, loaded):
        found = f"has {len(loaded[name])} classes" if name in loaded else "lacks it"
        messages.append(
            f"{name} is initialised anew: {checkpoint.path.stem} {found}, the data have {shapes[name][0]} classes"
        )
        loaded[name] = start.state.params[name]
    check_params(shapes, loaded, checkpoint.path)
    start.state.params = {name: loaded[name] for name in shapes}
    messages.append(f"starting from the weights of {checkpoint.path.stem} with a fresh schedule; checkpoints go to "
                    f"{args.model_prefix}")  # fmt: skip
    return start


def _classifier_of_other_size(shapes: Mapping[str, Shape], params: Mapping) -> list[str]:
    """The last layer's parameters that are missing, or differ from the network's in the number of classes alone."""

    def other_size(name: str) -> bool:
        found, expected = params[name].shape, tuple(shapes[name])
        return found != expected and found[1:] == expected[1:]

    last = [name for name in shapes if name.startswith("arg:")][-2:]
    return [name for name in last if name not in params or other_size(name)]


def _schedule(args, steps_per_epoch: int, base_lr: float, begin: int = 0) -> Schedule:
    return make_schedule(base_lr, args.lr_steps, steps_per_epoch, args.lr_factor, begin)


def _continued_schedule(args, steps_per_epoch: int, manifest: dict | None, update: int) -> Schedule:
    """The saved run's schedule as if it had never stopped, or another --lr from `update` on.

    --resume is the same command once more: there the --lr that the run began with is no new rate. With --retrain an
    explicit --lr always is one.
    """
    saved = {"base_lr": DEFAULT_LR, "begin": 0} if manifest is None else dict(manifest["schedule"])
    if saved["begin"]:
        # In updates of the run that saved it; with another batch size an epoch has another number of them.
        saved["begin"] = saved["begin"] * steps_per_epoch // manifest["steps_per_epoch"]
    if args.lr is not None and (args.retrain or args.lr not in (saved["base_lr"], _first_rate(manifest))):
        return _schedule(args, steps_per_epoch, args.lr, update)
    return _schedule(args, steps_per_epoch, saved["base_lr"], saved["begin"])


def _first_rate(manifest: dict | None) -> float | None:
    """The --lr of the command that wrote a checkpoint."""
    return None if manifest is None else manifest["arguments"]["lr"]


def _claim_prefix(args) -> None:
    """A fresh run must not mix with the checkpoints of another one: refuse, or with --overwrite remove them."""
    if args.overwrite:
        remove_checkpoints(args.model_prefix)
        return
    path = Path(args.model_prefix)
    found = sorted(path.parent.glob(f"{glob.escape(path.name)}-[0-9][0-9][0-9][0-9].params"))
    if found:
        raise UsageError(
            f"{found[-1]} is there already: continue that run with --resume, choose another --model-prefix, "
            "or replace it with --overwrite"
        )
