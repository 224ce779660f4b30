"""What a run says of itself: the header of its log and the manifest of its checkpoints."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.group import Group
from errors import UsageError
from training.data import Data
from training.options import ASYNC_STORE
from training.run_log import NoLog, RunLog
from training.saving import Saver
from training.start import Start

RECORDED_PACKAGES = ("mxnet", "mxnet-cu112", "torch", "numpy", "opencv-python", "simplejpeg")

# Flags in which the processes of one run may differ: each machine has its own devices and folders.
OWN_FLAGS = {
    "gpus", "cpus", "data_dir", "train_rec", "val_rec", "model_prefix", "model_load_prefix", "log_dir", "data_threads",
    "max_restarts", "stall_timeout",
}  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def arguments(args: argparse.Namespace) -> dict:
    """The flags in JSON's types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def check_agreement(args: argparse.Namespace, data: Data, group: Group) -> None:
    """UsageError where processes, started by hand on several machines, were given other flags or other data."""
    own = {name: value for name, value in arguments(args).items() if name not in OWN_FLAGS}
    own["training images"], own["validation images"] = data.train_images, data.val_images
    first = group.decide(lambda: own)

    def compare() -> None:
        other = [name for name, value in own.items() if value != first[name]]
        if other:
            name = other[0]
            flag = name if " " in name else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag}: {own[name]} in rank {group.rank}, {first[name]} in rank 0; all need the same flags and data"
            )

    group.attempt(compare)


def open_log(args: argparse.Namespace, network, data: Data, start: Start, group: Group) -> RunLog | NoLog:
    """The run's log with its header; a continued run goes on in the file that is there. Prints how it starts.

    Of several processes the first one logs.
    """
    if not group.leads:
        return NoLog()
    done = start.position
    resume = (done.epoch, done.batch) if start.continued_from else None
    log = RunLog(args.log_dir, resume)
    log.header(
        arguments=arguments(args), versions=versions(), network=network.name, engine=args.engine,
        parameters=network.parameters, multiply_adds=network.multiply_adds, classes=network.classes,
        train_images=data.train_images, val_images=data.val_images, steps_per_epoch=data.train.steps_per_epoch,
    )  # fmt: skip
    log.message(
        f"{network.name}: {network.parameters:,} parameters, {network.multiply_adds / 1e9:.3g} G multiply-adds, "
        f"{network.classes} classes, {data.train_images:,} training images"
    )
    for text in start.messages:
        log.message(text)
    if args.kv_store == ASYNC_STORE:
        log.message(
            f"{ASYNC_STORE}: the servers keep the momentum, checkpoints do not hold it; it starts from zero when the "
            "rate changes and when training is continued, and train lines tell of the first worker alone"
        )
    return log


def make_saver(args: argparse.Namespace, network, data: Data, start: Start) -> Saver:
    """Saves this run's checkpoints under --model-prefix."""
    manifest = {
        "network": network.name, "classes": network.classes, "image_shape": list(network.image_shape),
        "engine": args.engine, "optimizer": args.optimizer, "seed": args.seed,
        "steps_per_epoch": data.train.steps_per_epoch, "arguments": arguments(args), "versions": versions(),
    }  # fmt: skip
    return Saver(
        args.model_prefix,
        network.json,
        manifest,
        start.schedule,
        keep=args.keep,
        continued_from=start.continued_from,
    )
