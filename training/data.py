"""From flags to loaders: opens the packs, checks what they hold against the flags, and builds the two loaders."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.recordio import RecordFile
from engines.group import Group
from errors import UsageError
from training.augment import train_augmenter, validation_augmenter
from training.augment_options import augment_options
from training.loader import Loader


@dataclass(frozen=True)
class Data:
    """The loaders of a run and what their files hold."""

    train: Loader
    validation: Loader | None
    classes: int
    train_images: int
    val_images: int

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the loaders' threads and close their files."""
        for loader in (self.train, self.validation):
            if loader is not None:
                loader.close()
                loader.records.close()


def open_data(args: argparse.Namespace, group: Group) -> Data:
    """Open --train-rec and --val-rec; UsageError when they are missing, empty or do not fit the flags.

    --batch-size is that of all processes in `group` together; each of them gets its part of every batch.
    """
    records = open_pack(args.train_rec, "--train-rec", args)
    classes = check_labels(records, args.num_classes)
    check_size(records, args.num_examples, args.batch_size)
    shape = (3, args.image_size, args.image_size)
    shared = {"seed": args.seed, "threads": args.data_threads, "skip_bad": args.skip_bad}
    shared.update(num_parts=group.size, part_index=group.rank)
    batch_size = part_of_batch(args.batch_size, group)
    options = augment_options(args)
    train = Loader(
        records, batch_size, shape, augment=train_augmenter(options), shuffle=True, **shared,
    )  # fmt: skip
    validation, val_images = None, 0
    if args.val_rec is not None:
        val_records = open_pack(args.val_rec, "--val-rec", args)
        check_labels(val_records, classes)
        val_images = len(val_records)
        validation = Loader(
            val_records,
            batch_size,
            shape,
            augment=validation_augmenter(options),
            shuffle=False,
            **shared,
        )
    return Data(train, validation, classes, len(records), val_images)


def part_of_batch(batch_size: int, group: Group) -> int:
    """Rows of a batch that each process of `group` takes; UsageError where they cannot be equally many."""
    if batch_size % group.size:
        raise UsageError(f"--batch-size {batch_size} cannot be shared by {group.size} processes; make it a multiple")
    return batch_size // group.size


def open_pack(path: Path, flag: str, args: argparse.Namespace) -> RecordFile:
    """Open a pack; a missing one is answered with the flag that names it and how the preset's data are made."""
    if not path.exists():
        way_out = f"give its path with {flag} or its folder with --data-dir"
        if args.data_type in ("fashion-mnist", "cifar10"):
            way_out += f", or make it with: python -m data_prep {args.data_type}"
        elif flag == "--val-rec":
            way_out += "; --val-rec none trains without validation"
        raise UsageError(f"{path} is missing; {way_out}")
    return RecordFile(path)


def check_labels(records: RecordFile, num_classes: int | None) -> int:
    """Number of classes: `num_classes`, or the largest label + 1; UsageError for labels that are no class."""
    labels = records.labels()
    first = labels if labels.ndim == 1 else labels[:, 0]
    bad = ~np.isfinite(first) | (first < 0) | (first != np.floor(first))
    if num_classes is not None:
        bad |= first >= num_classes
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        bound = f"0 to {num_classes - 1}" if num_classes is not None else "whole numbers from 0"
        raise UsageError(
            f"{records.where(index)}: label {first[index]:g} is outside the classes ({bound}); "
            "check --num-classes, or the pack with: python -m data_prep verify"
        )
    return num_classes if num_classes is not None else int(first.max()) + 1


def check_size(records: RecordFile, num_examples: int | None, batch_size: int) -> None:
    """UsageError when the pack does not hold --num-examples images, or fewer than a batch."""
    if num_examples is not None and num_examples != len(records):
        raise UsageError(
            f"--num-examples {num_examples}, but {records.path} holds {len(records)} images; leave the flag out"
        )
    if batch_size > len(records):
        raise UsageError(
            f"--batch-size {batch_size} is larger than the dataset: {records.path} holds {len(records)} images"
        )
