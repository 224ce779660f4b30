"""`python -m graph run PREFIX EPOCH IMAGE...`: what a trained network sees in pictures.

A command stands above the rooms: pictures are decoded and cropped by the code that prepares validation images.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from command_line import Parser
from data_prep.lists import CLASSES_FILE, read_names
from errors import UsageError
from graph.checkpoint_args import add_checkpoint_args

TOP = 5
# Pictures computed at a time.
ROWS = 16
CLASSES_HELP = f"names of the classes, one a line, in the order of labels; unset: {CLASSES_FILE} beside the run's packs"


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    missing = [path for path in args.images if not Path(path).is_file()]
    if missing:
        raise UsageError(f"no such image: {', '.join(missing)}")
    given = read_names(Path(args.classes)) if args.classes else None
    from graph.memory import keep_freed_memory
    from graph.trained import load_trained

    keep_freed_memory()
    trained = load_trained(args.prefix, args.epoch, args.image_size)
    prepare = preparation(trained.image_size, trained.arguments)
    predict = predictor(trained)
    for start in range(0, len(args.images), ROWS):
        paths = args.images[start : start + ROWS]
        probabilities = predict(np.stack([prepare(path) for path in paths]))
        if not start:
            check_class_count(given, probabilities.shape[1], args.classes)
            names = given or classes_of_run(trained.arguments, probabilities.shape[1])
        for path, row in zip(paths, probabilities):
            print("\n".join(describe(path, row, names)), flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m graph run",
        description=f"Print the {TOP} most probable classes of every picture, prepared as validation images are.",
        allow_abbrev=False,
    )
    add_checkpoint_args(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or what else OpenCV decodes")
    parser.add_argument("--classes", metavar="FILE", help=CLASSES_HELP)
    return parser


def classes_of_run(arguments: Mapping[str, object], count: int) -> list[str] | None:
    """The names beside the packs that a network was trained with, as far as they are still there and so many."""
    for pack in (arguments.get("train_rec"), arguments.get("val_rec")):
        path = Path(str(pack)).parent / CLASSES_FILE
        with contextlib.suppress(UsageError):
            if pack and path.is_file() and len(names := read_names(path)) == count:
                # A run notes paths as it was given them: from another folder they may lead to another file.
                print(f"names of the classes from {path}", file=sys.stderr)
                return names
    return None


def check_class_count(names: Sequence[str] | None, classes: int, path: str | None) -> None:
    if names is not None and len(names) != classes:
        raise UsageError(f"{path} names {len(names)} classes, the network has {classes}")


def preparation(image_size: int, arguments: Mapping[str, object]):
    """path -> uint8 (3, image_size, image_size): the resizing and centre crop of the run's validation images."""
    from data_prep.decode import DecodeError, decode_image
    from training.augment import validation_augmenter
    from training.augment_options import AugmentOptions

    # The run's own resizing belongs to its own size.
    resize = int(arguments.get("val_resize") or 0) if image_size == arguments.get("image_size") else 0
    crop = validation_augmenter(AugmentOptions(image_size=image_size, val_resize=resize))

    def prepare(path: str) -> np.ndarray:
        try:
            image = decode_image(Path(path).read_bytes())
        except (OSError, DecodeError) as error:
            raise UsageError(f"{path}: {error}") from None
        return crop(image, np.random.default_rng(0)).transpose(2, 0, 1)

    return prepare


def predictor(trained):
    """Images uint8 (N, 3, H, W) -> probabilities (N, classes)."""
    import torch

    from graph.optimize import optimize_for_inference
    from graph.trained import logits

    fast = optimize_for_inference(trained.module)

    def predict(images: np.ndarray) -> np.ndarray:
        return torch.softmax(logits(fast, torch.from_numpy(images).float()), 1).numpy()

    return predict


def describe(path: str, probabilities: np.ndarray, names: Sequence[str] | None) -> list[str]:
    """Lines of one picture: its path, then the most probable classes."""
    lines = [path]
    for label in np.argsort(-probabilities, kind="stable")[:TOP]:
        name = names[label] if names is not None else f"class {label}"
        lines.append(f"  {100 * probabilities[label]:6.2f} %  {name}")
    return lines
