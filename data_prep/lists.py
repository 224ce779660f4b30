"""Lists of images: made from folders, text files and tables; read for packing.

A `.lst` file holds a line `index TAB label(s) TAB path` an image, as MXNet's tools write it; paths are
relative to a root folder. `classes.txt` beside it names the classes in the order of their labels.
"""

from __future__ import annotations

import csv
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import atomic_file
from errors import ProjectError, UsageError

CLASSES_FILE = "classes.txt"
LIST_SUFFIX = ".lst"
IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SHUFFLE_SEED = 100


class Item(NamedTuple):
    """One image of a list: its index (the record's key and id), its labels and its path below the root."""

    key: int
    labels: tuple[float, ...]
    path: str


class Entry(NamedTuple):
    """One image before it has an index.

    Labels are numbers, or names of classes that get their numbers later.
    """

    labels: tuple[float, ...]
    path: str


# --- sources of entries ---


def _is_hidden(name: str) -> bool:
    """Whether programs keep such a file for themselves: macOS leaves `._cat.jpg`, no image, beside `cat.jpg`."""
    return name.startswith(".")


def _images_among(names: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """The names that end as an image's does, sorted."""
    return sorted(name for name in names if name.lower().endswith(endings) and not _is_hidden(name))


def image_folders(root: Path, extensions: Iterable[str] = IMAGE_EXTENSIONS) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its images), both sorted, for every folder below `root` that holds images.

    Folders are named relative to `root`, with "/" between parts; links are followed, but not in circles. Hidden
    files and folders are passed over.
    """
    wanted = tuple(extension.lower() for extension in extensions)
    above: dict[str, tuple[str, ...]] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        parents = above.get(os.path.dirname(folder), ())
        if real in parents:
            folders.clear()
            continue
        above[folder] = (*parents, real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        names = _images_among(files, wanted)
        if names:
            yield Path(folder).relative_to(root).as_posix(), names


def folder_entries(
    root: Path, recursive: bool, extensions: Iterable[str] = IMAGE_EXTENSIONS, classes: list[str] | None = None
) -> tuple[list[str], Iterator[Entry]]:
    """(class names, entries) of a folder: recursive, every folder that holds images is a class; else all are 0.

    With `classes` labels are places in that list, and a folder that it lacks is an error.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    wanted = tuple(extension.lower() for extension in extensions)
    if not recursive:
        names = _images_among(os.listdir(root), wanted)
        if not names:
            raise UsageError(f"{root}: holds no images; --recursive looks in the folders below it, a class each")
        return [], (Entry((0.0,), name) for name in names)
    found = [folder for folder, _ in image_folders(root, extensions)]
    if not found:
        raise UsageError(f"{root}: no folder below it holds images ({' '.join(extensions)})")
    classes = found if classes is None else classes
    unknown = [folder for folder in found if folder not in set(classes)]
    if unknown:
        raise UsageError(f"{root / unknown[0]}: no such class among the {len(classes)} names given")
    numbers = {name: float(number) for number, name in enumerate(classes)}

    def entries() -> Iterator[Entry]:
        for folder, names in image_folders(root, extensions):
            for name in names:
                yield Entry((numbers[folder],), name if folder == "." else f"{folder}/{name}")

    return classes, entries()


def _as_numbers(fields: list[str]) -> tuple[float, ...] | None:
    try:
        return tuple(float(field) for field in fields)
    except ValueError:
        return None


def _rows_of_text(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                fields = line.rsplit(None, 1)
                if len(fields) != 2:
                    raise UsageError(f"{path}, line {number}: expected `path label`, found {line.strip()[:60]!r}")
                yield number, fields[0].strip(), fields[1:]


def _rows_of_table(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    with _open_text(path) as file:
        for number, row in enumerate(csv.reader(file), 1):
            if any(field.strip() for field in row):
                if len(row) < 2:
                    raise UsageError(f"{path}, line {number}: expected `path,label`, found {','.join(row)[:60]!r}")
                yield number, row[0].strip(), [field.strip() for field in row[1:]]


def _open_text(path: Path):
    try:
        # The mark that spreadsheets put before a table is not part of its first field.
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def file_entries(path: Path, root: Path, classes: list[str] | None = None) -> tuple[list[str], Iterator[Entry]]:
    """(class names, entries) of a file of `path label` lines, or of a table (.csv) `path,label[,label...]`.

    Labels are numbers, taken as they are, or names, numbered in sorted order (or by their place in
    `classes`). A table's first row is a heading when no image has the name in its first column; names may
    lack their extension.
    """
    table = path.suffix.lower() == ".csv"
    rows = _rows_of_table if table else _rows_of_text
    first = next(rows(path), None)
    if first is None:
        raise UsageError(f"{path}: holds no images")
    skipped = first[0] if table and _find_image(root, first[1]) is None and _as_numbers(first[2]) is None else 0
    names = set()
    for number, _, fields in rows(path):
        if number != skipped and _as_numbers(fields) is None:
            if len(fields) > 1:
                raise UsageError(f"{path}, line {number}: several labels must be numbers, found {fields}")
            names.add(fields[0])
    classes = sorted(names) if names and classes is None else classes or []
    numbers = {name: float(number) for number, name in enumerate(classes)}

    def entries() -> Iterator[Entry]:
        for number, name, fields in rows(path):
            if number == skipped:
                continue
            labels = _as_numbers(fields) if not names else (numbers.get(fields[0]),)
            if labels is None or None in labels:
                raise UsageError(f"{path}, line {number}: no such class: {fields[0]!r}")
            yield Entry(labels, (_find_image(root, name) or name) if table else name)

    return classes, entries()


def _find_image(root: Path, name: str) -> str | None:
    for extension in ("", *IMAGE_EXTENSIONS):
        if (root / (name + extension)).is_file():
            return name + extension
    return None


def read_names(path: Path) -> list[str]:
    """Names to show, one a line; two may be equal, as ImageNet's are. UsageError for a file that cannot be read."""
    try:
        with _open_text(path) as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_classes(path: Path) -> list[str]:
    """Class names, one a line; UsageError for a file that cannot be read or names a class twice."""
    names = read_names(path)
    if len(set(names)) != len(names):
        raise UsageError(f"{path}: names a class twice")
    return names


def write_classes(path: Path, classes: list[str]) -> None:
    atomic_file.write_text(path, "".join(f"{name}\n" for name in classes))


# --- writing .lst ---


def format_item(key: int, entry: Entry) -> str:
    """A line of a .lst file, written as MXNet's tool writes it."""
    if any(character in entry.path for character in "\t\n\r"):
        raise UsageError(f"{entry.path!r}: a .lst file cannot hold a path with a tab or a line break")
    return f"{key}\t" + "".join(f"{label:f}\t" for label in entry.labels) + f"{entry.path}\n"


def split_names(prefix: str, chunks: int, train_ratio: float, test_ratio: float) -> list[tuple[str, float, float]]:
    """(file, begin, end) of every list that a shuffled list is cut into; places are fractions of a whole.

    Names and order are those of MXNet's tool: per chunk the test part, then train, then validation.
    """
    if chunks < 1 or not 0 < train_ratio <= 1 or test_ratio < 0 or train_ratio + test_ratio > 1 + 1e-9:
        raise UsageError("--chunks must be 1 or more, --train-ratio in (0, 1], and both ratios together at most 1")
    parts = []
    for chunk in range(chunks):
        name = f"{prefix}_{chunk}" if chunks > 1 else prefix
        if train_ratio == 1:
            pieces = [("", 0.0, 1.0)]
        else:
            trained = min(test_ratio + train_ratio, 1.0)
            pieces = [("_test", 0.0, test_ratio), ("_train", test_ratio, trained), ("_val", trained, 1.0)]
        parts += [
            (f"{name}{suffix}{LIST_SUFFIX}", (chunk + begin) / chunks, (chunk + end) / chunks)
            for suffix, begin, end in pieces
            if end - begin > 1e-9
        ]
    return parts


def write_lists(
    prefix: str,
    entries: Iterable[Entry],
    *,
    shuffle: bool = True,
    seed: int = SHUFFLE_SEED,
    chunks: int = 1,
    train_ratio: float = 1.0,
    test_ratio: float = 0.0,
) -> dict[Path, int]:
    """Write the lists `split_names` names, atomically; returns how many images each holds.

    An image's index is its place before the shuffle, which numpy's frozen RandomState(seed) does. The lines
    wait in a temporary file, so memory holds eight bytes an image.
    """
    import numpy as np

    parts = split_names(prefix, chunks, train_ratio, test_ratio)
    folder = Path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as lines:
            ends = array("q", [0])
            for key, entry in enumerate(entries):
                ends.append(ends[-1] + lines.write(format_item(key, entry).encode("utf-8", "surrogateescape")))
            lines.flush()
            count = len(ends) - 1
            order = np.random.RandomState(seed).permutation(count) if shuffle else np.arange(count)
            written = {}
            for name, begin, end in parts:
                chosen = order[round(begin * count) : round(end * count)]
                with atomic_file.AtomicFile(name) as file:
                    for place in chosen:
                        file.write(os.pread(lines.fileno(), ends[place + 1] - ends[place], ends[place]))
                written[Path(name)] = len(chosen)
            return written
    except OSError as error:
        raise ProjectError(f"{error.filename or prefix}: cannot be written: {error.strerror}") from None


# --- reading .lst ---


def read_list(path: Path) -> Iterator[Item]:
    """Items of a .lst file in its order; UsageError names the line that is none."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            fields = line.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")
            try:
                item = Item(int(fields[0]), tuple(float(field) for field in fields[1:-1]), fields[-1].strip())
            except ValueError:
                item = None
            if item is None or not item.labels or not item.path or not 0 <= item.key < 1 << 63:
                raise UsageError(
                    f"{path}, line {number}: expected `index TAB label(s) TAB path`, found {line.strip()[:60]!r}"
                )
            yield item


def check_list(path: Path) -> int:
    """Number of images of a .lst file, read whole once.

    UsageError when it is empty or an index occurs twice.
    """
    import numpy as np

    keys = np.fromiter((item.key for item in read_list(path)), np.int64)
    if not len(keys):
        raise UsageError(f"{path}: holds no images")
    values, counts = np.unique(keys, return_counts=True)
    if len(values) != len(keys):
        raise UsageError(f"{path}: index {values[np.argmax(counts)]} occurs {counts.max()} times; it must be unique")
    return len(keys)
