"""The command `verify`: is every record of a pack framed, labelled and decodable, and does its index agree?"""

from __future__ import annotations

import functools
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import atomic_file
from command_line import HelpFormatter, Parser, counted
from data_prep import progress
from data_prep.lists import CLASSES_FILE, read_classes
from data_prep.recordio import (
    Frame,
    RecordError,
    RecordReader,
    index_path_of,
    is_range_record,
    read_index,
    scan,
    unpack,
)
from data_prep.workers import chunked, default_workers, ordered_map
from errors import ProjectError, UsageError

_CHUNK = 64
_FORMATS = {b"\xff\xd8\xff": "JPEG", b"\x89PN": "PNG", b"RIF": "WebP", b"BM": "BMP", b"II*": "TIFF", b"MM\0": "TIFF"}


class Checked(NamedTuple):
    """What was found in one record: a problem or "", labels, (height, width), format; no size for a range record."""

    problem: str
    labels: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    kind: str = ""
    header: bool = False


@dataclass
class Report:
    """Sums over a pack; `problems` are lines that name record and offset, in the order of the file. bad: numbers of the
    records among them, as they are framed. width: labels an image."""

    records: int = 0
    ranges: int = 0
    image_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    labels: Counter = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    width: int = 0


def image_format(data: bytes | memoryview) -> str:
    """Name of an image's format by its first bytes, "" when unknown."""
    start = bytes(data[:3])
    return next((name for magic, name in _FORMATS.items() if start.startswith(magic)), "")


def check_payload(payload: memoryview, classes: int | None) -> Checked:
    """Check header, labels and image of one record; labels must be below `classes` when that is known."""
    from data_prep.decode import DecodeError, decode_image

    try:
        header, image = unpack(payload)
        labels = (header.label,) if header.flag == 0 else tuple(header.label.tolist())
        if is_range_record(payload):
            return Checked("", labels, None, "", header.id == 0)
        wrong = _wrong_label(labels, classes)
        if wrong:
            return Checked(wrong, labels)
        return Checked("", labels, decode_image(image).shape[:2], image_format(image) or "other")
    except (RecordError, DecodeError) as error:
        return Checked(str(error))


def _wrong_label(labels: tuple[float, ...], classes: int | None) -> str:
    if not all(math.isfinite(label) for label in labels):
        return f"a label is no finite number: {labels}"
    # Several labels may be anything, boxes for example; a single one is a class.
    if len(labels) == 1 and (labels[0] < 0 or labels[0] != int(labels[0])):
        return f"label {labels[0]:g} is no class number"
    if len(labels) == 1 and classes is not None and labels[0] >= classes:
        return f"label {labels[0]:g} is outside the {classes} classes"
    return ""


@functools.lru_cache(maxsize=1)
def _reader(path: str) -> RecordReader:
    return RecordReader(path)


def _check_chunk(path: str, classes: int | None, frames: list[Frame]) -> list[Checked]:
    """Runs in the workers."""
    return [check_payload(_reader(path).read(frame), classes) for frame in frames]


def verify(path: Path, classes: int | None, workers: int, anywhere: bool = False) -> tuple[Report, list[Frame], int]:
    """Check every record; returns the report, the frames found, and the header record's number (-1: none).

    anywhere: behind damage look for records at any byte, see `recordio.scan`.
    """
    report = Report()
    frames: list[Frame] = []
    header_number = -1

    def damaged(offset: int, reason: str) -> None:
        report.problems.append(f"offset {offset}: {reason}")

    def framed() -> Iterator[Frame]:
        for frame in scan(path, damaged, anywhere):
            frames.append(frame)
            yield frame

    # In this process too the file may have changed since it was read last.
    _reader.cache_clear()
    function = functools.partial(_check_chunk, str(path), classes)
    chunks = ordered_map(function, chunked(framed(), _CHUNK), workers)
    for checked in progress.progress((result for chunk in chunks for result in chunk), path.name, unit="records"):
        frame = frames[report.records]
        if checked.header and checked.size is None and not checked.problem:
            header_number = report.records
        _add(report, frame, checked)
    return report, frames, header_number


def _add(report: Report, frame: Frame, checked: Checked) -> None:
    problem = checked.problem
    if not problem and checked.size is not None:
        report.width = report.width or len(checked.labels)
        if len(checked.labels) != report.width:
            problem = f"another number of labels ({len(checked.labels)}) than the records before it ({report.width})"
    if problem:
        report.problems.append(f"record {report.records} at offset {frame.offset}: {problem}")
        report.bad.add(report.records)
    elif checked.size is None:
        report.ranges += 1
    else:
        report.sizes.append(checked.size)
        report.kinds[checked.kind] += 1
        report.image_bytes += frame.length
        report.labels[checked.labels if len(checked.labels) > 1 else checked.labels[0]] += 1
    report.records += 1


def check_index(path: Path, frames: list[Frame]) -> list[str]:
    """What is wrong with the index of the pack `path`, whose records are `frames`."""
    index_path = index_path_of(path)
    if not index_path.exists():
        return [f"{index_path} is missing"]
    try:
        keys, offsets = read_index(index_path, path.stat().st_size)
    except (RecordError, UsageError) as error:
        return [str(error)]
    problems = []
    known, listed = {frame.offset for frame in frames}, offsets.tolist()
    wrong = [number for number, offset in enumerate(listed) if offset not in known]
    if wrong:
        problems.append(f"{index_path}, line {wrong[0] + 1}: no whole record begins at offset {listed[wrong[0]]}")
    missing = sorted(known - set(listed))
    if missing:
        problems.append(f"{index_path}: lacks {len(missing)} records, the first at offset {missing[0]}")
    if len(set(listed)) != len(listed):
        problems.append(f"{index_path}: lists {len(listed) - len(set(listed))} records twice")
    if len(set(keys.tolist())) != len(keys):
        problems.append(f"{index_path}: {len(keys) - len(set(keys.tolist()))} keys occur twice")
    return problems


def write_index(path: Path, frames: list[Frame], header_number: int) -> None:
    """Write the index of the pack `path` anew: keys count from 0; a face pack's header is 0, its images from 1."""
    start = 0 if header_number < 0 else 1
    lines = []
    for number, frame in enumerate(frames):
        key = 0 if number == header_number else number + start - (start and number > header_number)
        lines.append(f"{key}\t{frame.offset}\n")
    try:
        atomic_file.write_text(index_path_of(path), "".join(lines))
    except OSError as error:
        raise ProjectError(f"{index_path_of(path)}: cannot be written: {error.strerror}") from None


def _range(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}, mean {sum(values) / len(values):.1f}"


def summary(path: Path, report: Report, names: list[str]) -> list[str]:
    """Lines that describe the pack."""
    images = len(report.sizes)
    found = f"{counted(report.records, 'record')}, {counted(images, 'whole image')}"
    lines = [f"{path}: {path.stat().st_size} bytes, {found}"]
    if report.ranges:
        lines.append(f"  {counted(report.ranges, 'record')} without image (ranges of keys, insightface kind)")
    if not images:
        return lines
    counts = report.labels
    several = isinstance(next(iter(counts)), tuple)
    if several:
        lines.append(f"  labels: {len(next(iter(counts)))} an image")
    else:
        lines.append(f"  classes: {len(counts)}, labels {min(counts):g} to {max(counts):g}")
        lines.append(f"  images a class: {_range(list(counts.values()))}")
        rare, common = min(counts, key=counts.get), max(counts, key=counts.get)
        if counts[rare] != counts[common]:
            lines.append(f"    fewest: {_name(rare, names)}; most: {_name(common, names)}")
    lines.append(f"  height: {_range([size[0] for size in report.sizes])} pixels")
    lines.append(f"  width: {_range([size[1] for size in report.sizes])} pixels")
    lines.append(f"  bytes an image: mean {report.image_bytes / images:.0f}")
    lines.append(f"  formats: {', '.join(f'{kind} {count}' for kind, count in report.kinds.most_common())}")
    return lines


def _name(label: float, names: list[str]) -> str:
    return f"{label:g} ({names[int(label)]})" if label < len(names) else f"{label:g}"


def classes_beside(path: Path, given: Path | None = None) -> list[str]:
    """Names of a pack's classes: from the file given, else from classes.txt beside it, else none."""
    if given is not None:
        return read_classes(given)
    beside = path.parent / CLASSES_FILE
    return read_classes(beside) if beside.exists() else []


def main(argv: list[str] | None = None) -> int:
    """The command `verify`."""
    parser = Parser(
        "python -m data_prep verify", formatter_class=HelpFormatter,
        description="Check that every record of a pack is framed, labelled and decodable, and that its index agrees.",
    )  # fmt: skip
    parser.add_argument("file", type=Path, help="the .rec file")
    parser.add_argument("--num-classes", type=int, help=f"labels must be below this; unset: lines of {CLASSES_FILE}")
    parser.add_argument("--fix-index", action="store_true", help="write the .idx anew when it is wrong")
    parser.add_argument("--max-problems", type=int, default=20, help="problems to print")
    parser.add_argument("--num-thread", type=int, default=default_workers(), help="worker processes")
    args = parser.parse_args(argv)
    names = classes_beside(args.file)
    report, frames, header_number = verify(args.file, args.num_classes or len(names) or None, args.num_thread)
    index_problems = check_index(args.file, frames)
    if index_problems and args.fix_index and frames:
        write_index(args.file, frames, header_number)
        records = counted(len(frames), "record")
        print(f"{index_path_of(args.file)}: written anew, {records}; it was wrong: {index_problems[0]}")
        index_problems = []
    print("\n".join(summary(args.file, report, names)))
    problems = report.problems + index_problems
    if not report.records:
        problems.append("it holds no record")
    for problem in problems[: args.max_problems]:
        print(f"problem: {problem}", file=sys.stderr)
    if len(problems) > args.max_problems:
        print(f"... and {len(problems) - args.max_problems} more problems", file=sys.stderr)
    print(counted(len(problems), "problem") if problems else "no problems")
    if report.problems and report.sizes:
        classes = ["--num-classes", str(args.num_classes)] if args.num_classes else []
        copy = args.file.with_name(f"{args.file.stem}_whole.rec")
        words = ["cat", "--skip-damaged", *classes, str(args.file), "-o", str(copy)]
        print(f"what is whole can be saved: python -m data_prep {shlex.join(words)}")
    elif index_problems and frames:
        words = ["verify", "--fix-index", str(args.file)]
        print(f"the index can be written anew: python -m data_prep {shlex.join(words)}")
    return 1 if problems else 0
