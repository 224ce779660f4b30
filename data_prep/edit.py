"""The commands `cat`, `split` and `extract`: packs out of packs, and packs back to image files.

Images and labels are copied byte for byte; only --skip-damaged decodes images, to check them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import atomic_file
from command_line import HelpFormatter, Parser, counted
from data_prep.lists import (
    CLASSES_FILE,
    LIST_SUFFIX,
    SHUFFLE_SEED,
    Entry,
    format_item,
    read_classes,
    write_classes,
)
from data_prep.progress import progress
from data_prep.recordio import (
    RecordError,
    RecordFile,
    RecordReader,
    RecordWriter,
    index_path_of,
    is_range_record,
    unpack,
)
from data_prep.verify import classes_beside, image_format, verify
from data_prep.workers import default_workers
from errors import ProjectError, UsageError

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "": ".bin"}


def _refuse_own_inputs(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in taken:
            raise UsageError(f"{path}: is an input; name another output")


def _refuse_other_classes(names: list[str], folder: Path) -> None:
    beside = folder / CLASSES_FILE
    if names and beside.exists() and read_classes(beside) != names:
        raise UsageError(f"{beside}: names other classes than the packs have; write into another folder")


def _copy_classes(names: list[str], folder: Path) -> None:
    if names and not (folder / CLASSES_FILE).exists():
        write_classes(folder / CLASSES_FILE, names)


def cat(
    inputs: list[Path], output: Path, skip_damaged: bool = False, classes: int | None = None, workers: int = 1
) -> tuple[int, int]:
    """Merge packs, one after the other, under new keys 0, 1, ...; returns the numbers of records and of those left out.

    skip_damaged: leave out what `verify` would complain about, instead of failing there. classes: labels must be below
    this; None for the lines of classes.txt. workers: processes that check the images.
    """
    _refuse_own_inputs(inputs, [output])
    names = {tuple(classes_beside(path)) for path in inputs} - {()}
    if len(names) > 1:
        raise UsageError(f"the packs' {CLASSES_FILE} differ: a label does not mean the same class in all of them")
    common = list(*names)
    _refuse_other_classes(common, output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    key = left_out = width = 0
    with RecordWriter(output) as writer:
        for path in inputs:
            records, damaged = _whole_records(path, classes, workers) if skip_damaged else (_records(path), 0)
            left_out += damaged
            for record in records:
                labels = _label_count(record)
                width = width or labels
                if labels not in (0, width):
                    raise UsageError(f"{path}: has {counted(labels, 'label')} an image where others have {width}")
                writer.write(key, record)
                key += 1
        if not key:
            raise ProjectError(f"{inputs[0]}: holds no whole record; {output} is not written")
    _copy_classes(common, output.parent)
    return key, left_out


def _label_count(record: memoryview) -> int:
    """Labels of an image record, 0 for records of another kind."""
    if is_range_record(record):
        return 0
    try:
        return max(1, unpack(record)[0].flag)
    except RecordError:
        return 0


def _records(path: Path) -> Iterator[memoryview]:
    """All records of a pack, in the order of its index."""
    with RecordFile(path) as file:
        for number in progress(range(len(file)), path.name):
            yield file.read(number)


def _whole_records(path: Path, classes: int | None, workers: int) -> tuple[Iterator[memoryview], int]:
    """(The records in which `verify` finds nothing wrong, in the order of the file; the number of the others).

    The others are those that the index lists beyond these; without an index, the damaged places.
    """
    report, frames, _ = verify(path, classes or len(classes_beside(path)) or None, workers, anywhere=True)
    left_out = len(report.problems)
    if index_path_of(path).exists():
        # Counted only: offsets behind damage are wrong.
        lines = index_path_of(path).read_bytes().splitlines()
        left_out = max(len(lines) - report.ranges - len(report.sizes), len(report.bad))
    reader = RecordReader(path)
    whole = (reader.read(frame) for number, frame in enumerate(frames) if number not in report.bad)
    return (record for record in whole if not is_range_record(record)), left_out


def split(path: Path, outputs: list[Path], shares: list[float], seed: int) -> list[int]:
    """Deal the records of a pack out to `outputs`, `shares` of every class each; keys and order are kept.

    Within a class numpy's frozen RandomState(seed) chooses. Returns the numbers of records.
    """
    _refuse_own_inputs([path], outputs)
    names = classes_beside(path)
    for output in outputs:
        _refuse_other_classes(names, output.parent)
    with RecordFile(path) as file:
        labels = file.labels()
        labels = labels if labels.ndim == 1 else labels[:, 0]
        part = assign(labels, shares, seed)
        counts = []
        for number, output in enumerate(outputs):
            output.parent.mkdir(parents=True, exist_ok=True)
            chosen = np.flatnonzero(part == number)
            with RecordWriter(output) as writer:
                for record in progress(chosen, output.name):
                    writer.write(int(file.keys[record]), file.read(int(record)))
            counts.append(len(chosen))
            _copy_classes(names, output.parent)
    return counts


def assign(labels: np.ndarray, shares: list[float], seed: int) -> np.ndarray:
    """Number of the part, (N,), that every record with these labels (N,) goes to."""
    random = np.random.RandomState(seed)
    cuts = np.cumsum(shares) / np.sum(shares)
    part = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        part[members] = np.searchsorted(cuts, (np.arange(len(members)) + 0.5) / len(members))
    return np.minimum(part, len(shares) - 1)


def extract(path: Path, folder: Path) -> int:
    """Write the images of a pack into FOLDER/CLASS/KEY.ENDING, and FOLDER/NAME.lst to pack them again."""
    names = classes_beside(path)
    _refuse_other_classes(names, folder)
    lines = []
    with RecordFile(path) as file:
        for number in progress(range(len(file)), path.name):
            header, image = file.unpack(number)
            labels = (header.label,) if header.flag == 0 else tuple(header.label.tolist())
            key = int(file.keys[number])
            name = f"{_class_folder(labels[0], names)}/{key}{_SUFFIXES[image_format(image)]}"
            target = folder / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(image)
            except OSError as error:
                raise ProjectError(f"{target}: cannot be written: {error.strerror}") from None
            lines.append(format_item(key, Entry(labels, name)))
    atomic_file.write_text(folder / f"{path.stem}{LIST_SUFFIX}", "".join(lines))
    _copy_classes(names, folder)
    return len(lines)


def _class_folder(label: float, names: list[str]) -> str:
    name = names[int(label)] if label == label and 0 <= label < len(names) else f"{label:g}"
    # Class names are free text ("T-shirt/top"); folder names are not.
    name = "".join(character if character.isalnum() or character in " ._-" else "_" for character in name)
    return name.strip(". ") or "_"


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return Parser(
        f"python -m data_prep {command}", description=description,
        formatter_class=HelpFormatter,
    )  # fmt: skip


def cat_main(argv: list[str] | None = None) -> int:
    """The command `cat`."""
    parser = _parser("cat", "Merge packs into one, one after the other; keys are given anew.")
    parser.add_argument("files", type=Path, nargs="+", help="the .rec files")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .rec file to write")
    parser.add_argument(
        "--skip-damaged", action="store_true",
        help="check every record of the files as `verify` does, whatever their indexes list, and leave out those that "
        "are cut off, do not decode, or have wrong labels",
    )  # fmt: skip
    parser.add_argument(
        "--num-classes", type=int,
        help=f"labels must be below this for --skip-damaged; unset: lines of {CLASSES_FILE}",
    )  # fmt: skip
    parser.add_argument("--num-thread", type=int, default=default_workers(), help="worker processes that check")
    args = parser.parse_args(argv)
    count, left_out = cat(args.files, args.output, args.skip_damaged, args.num_classes, args.num_thread)
    print(f"{args.output}: {counted(count, 'record')}" + (f", {left_out} left out" if args.skip_damaged else ""))
    return 0


def split_main(argv: list[str] | None = None) -> int:
    """The command `split`."""
    parser = _parser("split", "Deal the records of a pack out to several, every class in the same shares.")
    parser.add_argument("file", type=Path, help="the .rec file")
    parser.add_argument("outputs", type=Path, nargs="+", help="the .rec files to write")
    parser.add_argument("--shares", type=float, nargs="+", help="of the outputs, such as 9 1; unset: equal")
    parser.add_argument("--seed", type=int, default=SHUFFLE_SEED, help="of the choice")
    args = parser.parse_args(argv)
    shares = args.shares or [1.0] * len(args.outputs)
    if len(shares) != len(args.outputs) or not all(share > 0 for share in shares):
        raise UsageError(f"--shares: {len(args.outputs)} numbers above 0 are needed, one an output")
    if len({path.resolve() for path in args.outputs}) != len(args.outputs):
        raise UsageError("an output is named twice")
    for path, count in zip(args.outputs, split(args.file, args.outputs, shares, args.seed)):
        print(f"{path}: {counted(count, 'record')}")
    return 0


def extract_main(argv: list[str] | None = None) -> int:
    """The command `extract`."""
    parser = _parser("extract", "Write the images of a pack as files, a folder a class, with a list of them.")
    parser.add_argument("file", type=Path, help="the .rec file")
    parser.add_argument("folder", type=Path, help="folder to write into")
    args = parser.parse_args(argv)
    print(f"{args.folder}: {counted(extract(args.file, args.folder), 'image')}")
    return 0
