"""ImageNet (ILSVRC2012) as packs, read out of its tar files, nested ones included, or from unpacked folders.

A list is made first (train.lst shuffled, val.lst in order); its paths point into the archives, so packing it is the
ordinary `im2rec`, with workers, --resume and all, and nothing is unpacked to disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from command_line import HelpFormatter, Parser
from data_prep.archives import TAR_SUFFIX, tar_members
from data_prep.im2rec import add_pack_args, pack_lists
from data_prep.lists import (
    CLASSES_FILE,
    IMAGE_EXTENSIONS,
    LIST_SUFFIX,
    SHUFFLE_SEED,
    Entry,
    folder_entries,
    write_classes,
    write_lists,
)
from errors import UsageError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
SYNSETS_FILES = ("synsets.txt", "synset.txt", "LOC_synset_mapping.txt")
VAL_LISTS = ("val_list.txt", "imagenet_2012_validation_synset_labels.txt")


def read_synsets(path: Path) -> list[str]:
    """Synsets in the order of their labels: the first word of every line."""
    synsets = [line.split()[0] for line in _text(path).splitlines() if line.strip()]
    if len(set(synsets)) != len(synsets):
        raise UsageError(f"{path}: names a synset twice")
    return synsets


def read_val_labels(path: Path, synsets: list[str]) -> dict[str, float] | list[float]:
    """Labels of the validation images.

    By name (lower case, without folder and ending) from lines `path label`, or in the order of the names from lines
    that hold a label alone. A label is a number from 0 on, or a synset.
    """
    numbers = {synset: float(number) for number, synset in enumerate(synsets)}
    by_name: dict[str, float] = {}
    in_order: list[float] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        label = float(fields[-1]) if fields[-1].isdigit() else numbers.get(fields[-1])
        if label is None or not 0 <= label < len(synsets) or len(fields) > 2:
            raise UsageError(
                f"{path}, line {number}: expected `path label` or `label` with a label below {len(synsets)} "
                f"or a synset, found {line.strip()[:60]!r}"
            )
        if len(fields) == 2:
            by_name[_stem(fields[0])] = label
        else:
            in_order.append(label)
    if by_name and in_order:
        raise UsageError(f"{path}: some lines hold a path, some do not")
    return by_name or in_order


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _stem(name: str) -> str:
    return PurePosixPath(name).stem.lower()


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _first(source: Path, names: Iterable[str]) -> Path | None:
    return next((source / name for name in names if (source / name).exists()), None)


def train_archives(source: Path) -> list[tuple[str, Path, object]]:
    """(synset, tar file, stretch of the inner tar file or None) for every class, sorted by synset.

    The classes' tar files lie inside ILSVRC2012_img_train.tar, or beside each other in the folder `train`.
    """
    whole = source / TRAIN_TAR
    if whole.exists():
        found = [(_stem(part.name), whole, part) for part in tar_members(whole) if part.name.endswith(TAR_SUFFIX)]
        if not found:
            raise UsageError(f"{whole}: holds no tar file of a class")
    else:
        found = [(path.stem, path, None) for path in (source / "train").glob(f"*{TAR_SUFFIX}")]
    return sorted(found, key=lambda entry: entry[0])


def train_entries(source: Path, synsets: list[str] | None) -> tuple[list[str], Iterator[Entry]]:
    """(synsets in the order of their labels, entries) of the training images."""
    archives = train_archives(source)
    if not archives:
        if not (source / "train").is_dir():
            raise UsageError(f"{source}: holds neither {TRAIN_TAR} nor a folder train")
        classes, entries = folder_entries(source / "train", True, classes=synsets)
        return classes, (Entry(entry.labels, f"train/{entry.path}") for entry in entries)
    classes = synsets or [synset for synset, _, _ in archives]
    numbers = {synset: float(number) for number, synset in enumerate(classes)}
    unknown = [synset for synset, _, _ in archives if synset not in numbers]
    if unknown:
        raise UsageError(f"{archives[0][1]}: class {unknown[0]} is not in the synset list")

    def entries() -> Iterator[Entry]:
        for synset, path, part in archives:
            for member in tar_members(path, path.relative_to(source).as_posix(), part):
                if _is_image(member.name):
                    yield Entry((numbers[synset],), str(member))

    return classes, entries()


def val_entries(source: Path, synsets: list[str], val_list: Path | None) -> Iterator[Entry]:
    """Entries of the validation images, sorted by name."""
    folder = source / "val"
    if (source / VAL_TAR).exists():
        members = tar_members(source / VAL_TAR, VAL_TAR)
        paths = {_stem(member.name): str(member) for member in members if _is_image(member.name)}
    elif folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
        for entry in folder_entries(folder, True, classes=synsets)[1]:
            yield Entry(entry.labels, f"val/{entry.path}")
        return
    elif folder.is_dir():
        paths = {path.stem.lower(): f"val/{path.name}" for path in folder.iterdir() if _is_image(path.name)}
    else:
        raise UsageError(f"{source}: holds neither {VAL_TAR} nor a folder val")
    if val_list is None:
        raise UsageError(f"{source}: the validation images need labels: --val-list, or one of {' '.join(VAL_LISTS)}")
    labels = read_val_labels(val_list, synsets)
    if isinstance(labels, list):
        if len(labels) != len(paths):
            raise UsageError(f"{val_list}: {len(labels)} labels for {len(paths)} validation images")
        labels = dict(zip(sorted(paths), labels))
    missing = sorted(set(paths) - set(labels))
    if missing:
        raise UsageError(f"{val_list}: no label for {missing[0]} and {len(missing) - 1} other images")
    for name in sorted(paths):
        yield Entry((labels[name],), paths[name])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m data_prep imagenet", description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "source", type=Path,
        help=f"folder with {TRAIN_TAR} and {VAL_TAR}, or with folders train (a folder or a .tar a class) and val",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for train and val .lst, .rec, .idx")
    parser.add_argument("--parts", nargs="+", choices=["train", "val"], default=["train", "val"], help="what to pack")
    parser.add_argument(
        "--synsets", type=Path,
        help=f"synsets in the order of their labels; unset: {' or '.join(SYNSETS_FILES)} in SOURCE, else sorted",
    )  # fmt: skip
    parser.add_argument(
        "--val-list", type=Path,
        help=f"labels of the validation images; unset: {' or '.join(VAL_LISTS)} in SOURCE",
    )  # fmt: skip
    parser.add_argument("--no-shuffle", dest="shuffle", action="store_false", help="keep the training set's order")
    parser.add_argument("--seed", type=int, default=SHUFFLE_SEED, help="of the shuffle")
    add_pack_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command `imagenet`."""
    args = build_parser().parse_args(argv)
    if not args.source.is_dir():
        raise UsageError(f"{args.source}: no such folder")
    synsets_path = args.synsets or _first(args.source, SYNSETS_FILES)
    synsets = read_synsets(synsets_path) if synsets_path else None
    lists = {part: args.output / f"{part}{LIST_SUFFIX}" for part in args.parts}
    # Reading a million headers takes a minute: a list that an interrupted run has finished is used again.
    missing = [part for part, path in lists.items() if not (args.resume and path.exists())]
    if synsets is None or "train" in missing:
        synsets, entries = train_entries(args.source, synsets)
    if "train" in missing:
        write_lists(str(args.output / "train"), entries, shuffle=args.shuffle, seed=args.seed)
    if "val" in missing:
        val_list = args.val_list or _first(args.source, VAL_LISTS)
        write_lists(str(args.output / "val"), val_entries(args.source, synsets, val_list), shuffle=False)
    write_classes(args.output / CLASSES_FILE, synsets)
    return pack_lists(list(lists.values()), args.source, args)
