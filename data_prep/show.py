"""The command `show`: a picture of samples of a pack with their labels, before or after augmentation."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

import atomic_file
from command_line import HelpFormatter, Parser
from data_prep.decode import DecodeError, decode_image
from data_prep.recordio import RecordError, RecordFile
from data_prep.verify import classes_beside
from errors import ProjectError, UsageError

_TEXT_HEIGHT = 16
_GAP = 4
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_SCALE = 0.38
_BACKGROUND, _INK = 255, 40


def parse_grid(text: str) -> tuple[int, int]:
    """(rows, columns) of "8x8"."""
    match = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
    if not match or not int(match[1]) * int(match[2]):
        raise UsageError(f"--grid {text}: expected ROWSxCOLUMNS, such as 8x8")
    return int(match[1]), int(match[2])


def choose(count: int, samples: int, seed: int, first: bool) -> list[int]:
    """Numbers of the records to show: the first ones, or some at random, in the order of the pack."""
    if first or samples >= count:
        return list(range(min(samples, count)))
    return sorted(np.random.RandomState(seed).permutation(count)[:samples].tolist())


def caption(label: float | np.ndarray, names: list[str]) -> str:
    """A label as text: its number and, when known, its class; several labels are joined."""
    labels = np.atleast_1d(label)
    text = " ".join(f"{value:g}" for value in labels)
    if len(labels) == 1 and 0 <= labels[0] < len(names):
        text += f" {names[int(labels[0])]}"
    # The font of OpenCV has ASCII only.
    return text.encode("ascii", "replace").decode()


def _fit(image: np.ndarray, cell: int) -> np.ndarray:
    """The image as large as a square cell holds it, centred."""
    scale = cell / max(image.shape[:2])
    width, height = (max(1, round(edge * scale)) for edge in (image.shape[1], image.shape[0]))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    placed = np.full((cell, cell, 3), _BACKGROUND, np.uint8)
    top, left = (cell - height) // 2, (cell - width) // 2
    placed[top : top + height, left : left + width] = cv2.resize(image, (width, height), interpolation=method)
    return placed


def draw(images: list[np.ndarray], captions: list[str], columns: int, cell: int) -> np.ndarray:
    """uint8 RGB picture of the images in rows of `columns`, each in a square of `cell` pixels above its caption."""
    rows = -(-len(images) // columns)
    step, line = cell + _GAP, cell + _TEXT_HEIGHT + _GAP
    canvas = np.full((rows * line + _GAP, columns * step + _GAP, 3), _BACKGROUND, np.uint8)
    for number, (image, text) in enumerate(zip(images, captions)):
        top, left = _GAP + number // columns * line, _GAP + number % columns * step
        canvas[top : top + cell, left : left + cell] = _fit(image, cell)
        label = canvas[top + cell : top + cell + _TEXT_HEIGHT, left : left + cell]
        part = label.copy()
        cv2.putText(part, text, (1, _TEXT_HEIGHT - 5), _FONT, _FONT_SCALE, (_INK,) * 3, 1, cv2.LINE_AA)
        label[:] = part
    return canvas


def read_samples(
    file: RecordFile, records: list[int], names: list[str], augment: Callable[[np.ndarray, int], np.ndarray]
) -> tuple[list[np.ndarray], list[str]]:
    """(images, captions) of some records; augment: (image, record) -> image."""
    images, captions = [], []
    for record in records:
        header, data = file.unpack(record)
        try:
            images.append(augment(decode_image(data), record))
        except DecodeError as error:
            raise RecordError(f"{file.where(record)}: {error}") from None
        captions.append(caption(header.label, names))
    return images, captions


def build_parser() -> argparse.ArgumentParser:
    # The one place where this room looks into training/, and only for what the user asked to see.
    from training.augment_options import add_augment_args

    parser = Parser(
        "python -m data_prep show", formatter_class=HelpFormatter,
        description="Draw samples of a pack with their labels, before or after augmentation.",
    )  # fmt: skip
    parser.add_argument("file", type=Path, help="the .rec file")
    parser.add_argument("-o", "--output", type=Path, default=Path("grid.png"), help="the picture to write")
    parser.add_argument("--grid", default="8x8", help="rows x columns")
    parser.add_argument("--cell", type=int, default=96, help="pixels of a sample's square")
    parser.add_argument("--first", action="store_true", help="the first records instead of random ones")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and of the augmentation")
    parser.add_argument("--classes", type=Path, help="class names; unset: classes.txt beside the pack")
    group = parser.add_argument_group("augmentation")
    group.add_argument("--augment", action="store_true", help="show the samples as training sees them")
    group.add_argument("--image-size", type=int, default=224, help="pixels of an augmented image's edge")
    add_augment_args(group)
    return parser


def augmentation(args: argparse.Namespace) -> Callable[[np.ndarray, int], np.ndarray]:
    """(image, record) -> image as the options say; without --augment the image itself."""
    if not args.augment:
        return lambda image, record: image
    from training.augment import train_augmenter
    from training.augment_options import augment_options

    augmenter = train_augmenter(augment_options(args))
    return lambda image, record: augmenter(image, np.random.default_rng([args.seed, record]))


def main(argv: list[str] | None = None) -> int:
    """The command `show`."""
    args = build_parser().parse_args(argv)
    rows, columns = parse_grid(args.grid)
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"{args.output}: the picture's name must end in .png or .jpg")
    if args.cell < 8:
        raise UsageError(f"--cell {args.cell}: 8 pixels at least")
    with RecordFile(args.file) as file:
        records = choose(len(file), rows * columns, args.seed, args.first)
        if not records:
            raise UsageError(f"{args.file}: holds no images")
        names = classes_beside(args.file, args.classes)
        images, captions = read_samples(file, records, names, augmentation(args))
    picture = cv2.cvtColor(draw(images, captions, columns, args.cell), cv2.COLOR_RGB2BGR)
    try:
        atomic_file.write_bytes(args.output, cv2.imencode(args.output.suffix.lower(), picture)[1].tobytes())
    except OSError as error:
        raise ProjectError(f"{args.output}: cannot be written: {error.strerror}") from None
    print(f"{args.output}: {len(images)} samples of {args.file}")
    return 0
