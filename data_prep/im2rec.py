"""Make a list of images, or pack the images of a list: the options of MXNet's im2rec tool, and some more.

im2rec.py --list --recursive PREFIX ROOT      writes PREFIX.lst (or its parts) and classes.txt
im2rec.py --resize 256 PREFIX ROOT            packs PREFIX.lst, and PREFIX_*.lst, beside them
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

if not __package__:
    # Run as a script: the project's folder takes the place of this one, whose modules are no top-level names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from command_line import HelpFormatter, Parser, counted
from data_prep.conversion import DECODE, DEFAULT_QUALITY, JPEG, MARKERS, PNG, Conversion
from data_prep.lists import (
    CLASSES_FILE,
    IMAGE_EXTENSIONS,
    LIST_SUFFIX,
    SHUFFLE_SEED,
    folder_entries,
    read_list,
    write_classes,
    write_lists,
)
from data_prep.turbojpeg import load_library
from data_prep.workers import default_workers, start_early
from errors import UsageError, run_command


def add_list_args(parser: argparse.ArgumentParser) -> None:
    """Options of making a list."""
    group = parser.add_argument_group("making a list")
    group.add_argument("--exts", nargs="+", default=list(IMAGE_EXTENSIONS), help="endings of image files")
    group.add_argument("--chunks", type=int, default=1, help="number of lists to cut the set into")
    group.add_argument("--train-ratio", type=float, default=1.0, help="share of the images in _train.lst")
    group.add_argument("--test-ratio", type=float, default=0.0, help="share of the images in _test.lst")
    group.add_argument("--no-shuffle", dest="shuffle", action="store_false", help="keep the sorted order")
    group.add_argument("--seed", type=int, default=SHUFFLE_SEED, help="of the shuffle")


def add_pack_args(parser: argparse.ArgumentParser) -> None:
    """Options of packing."""
    group = parser.add_argument_group("packing")
    group.add_argument("--resize", type=int, default=0, help="pixels of the short edge; 0 leaves the size")
    group.add_argument("--center-crop", action="store_true", help="cut out the middle square, before resizing")
    group.add_argument("--quality", type=int, help="1-100 for .jpg (95 when unset), 1-9 for .png (9 when unset)")
    group.add_argument("--encoding", choices=[JPEG, PNG], default=JPEG, help="of images that are converted")
    group.add_argument(
        "--color", type=int, choices=[-1, 0, 1], default=1,
        help="1: RGB; 0: grey; -1: as the file has it, with alpha and 16 bits where the encoding holds them",
    )  # fmt: skip
    group.add_argument(
        "--pass-through", action="store_true",
        help="pack every file as it is; colour JPEGs of the wanted size always are",
    )  # fmt: skip
    group.add_argument(
        "--check", choices=[DECODE, MARKERS], default=DECODE,
        help="of images that are packed as they are; markers: find JPEGs that are cut off, at the disk's speed",
    )  # fmt: skip
    group.add_argument(
        "--yuv-planes", action="store_true",
        help="resize upright 4:2:0 JPEGs as the planes they store, not as RGB: faster; needs the system's libturbojpeg",
    )  # fmt: skip
    group.add_argument("--num-thread", type=int, default=default_workers(), help="worker processes")
    group.add_argument("--resume", action="store_true", help="continue an interrupted pack")
    group.add_argument(
        "--allow-rejects", type=int, default=0, metavar="N",
        help="exit status 0 although up to N images do not decode and are left out",
    )  # fmt: skip


def conversion_of(args: argparse.Namespace) -> Conversion:
    """The Conversion that the packing options ask for."""
    if args.num_thread < 1:
        raise UsageError(f"--num-thread {args.num_thread}: at least one worker is needed")
    quality = DEFAULT_QUALITY[args.encoding] if args.quality is None else args.quality
    return Conversion(
        args.resize, args.center_crop, quality, args.encoding, args.color,
        args.pass_through, args.check, args.yuv_planes,
    )  # fmt: skip


def pack_lists(lists: list[Path], root: Path, args: argparse.Namespace, all_labels: bool = True) -> int:
    """Pack every list beside itself and print a summary; returns the exit status."""
    conversion = conversion_of(args)
    if conversion.yuv_planes:
        # Said once, here, and not by every worker.
        load_library()
    # Handing bytes to a worker and back costs more than following markers: one process keeps up with fast disks.
    workers = 1 if conversion.pass_through and conversion.check == MARKERS else args.num_thread
    start_early(workers)
    from data_prep.packing import pack_list, report

    options = {"all_labels": all_labels, "workers": workers, "resume": args.resume}
    return report([pack_list(path, root, conversion, **options) for path in lists], args.allow_rejects)


def make_lists(prefix: str, entries, classes: list[str], args: argparse.Namespace) -> list[Path]:
    """Write lists and class names as the list options say, and name them."""
    written = write_lists(
        prefix, entries, shuffle=args.shuffle, seed=args.seed, chunks=args.chunks,
        train_ratio=args.train_ratio, test_ratio=args.test_ratio,
    )  # fmt: skip
    for path, count in written.items():
        print(f"{path}: {counted(count, 'image')}")
    if classes:
        write_classes(Path(prefix).parent / CLASSES_FILE, classes)
        print(f"{Path(prefix).parent / CLASSES_FILE}: {counted(len(classes), 'class', 'classes')}")
    return list(written)


def find_lists(prefix: Path) -> list[Path]:
    """PREFIX.lst and PREFIX_*.lst, sorted."""
    found = sorted(prefix.parent.glob(f"{prefix.name}_*{LIST_SUFFIX}"))
    whole = prefix.with_name(prefix.name + LIST_SUFFIX)
    found = [whole, *found] if whole.exists() else found
    if not found:
        raise UsageError(f"{whole}: no such list; --list makes one")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=None if not __package__ else "python -m data_prep im2rec",
        description=__doc__, formatter_class=_HelpFormatter,
    )  # fmt: skip
    parser.add_argument("prefix", help="path and beginning of the name of lists and packs")
    parser.add_argument("root", type=Path, help="folder that the paths in the lists start from")
    parser.add_argument("--list", action="store_true", help="make a list instead of packing one")
    parser.add_argument("--recursive", action="store_true", help="a class for every folder below ROOT")
    add_list_args(parser)
    add_pack_args(parser)
    parser.add_argument("--pack-label", action="store_true", help="pack all labels of an image, not only the first")
    return parser


class _HelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, the description's lines kept."""


def main(argv: list[str] | None = None) -> int:
    """The command `im2rec`."""
    args = build_parser().parse_args(argv)
    if args.list:
        classes, entries = folder_entries(args.root, args.recursive, args.exts)
        make_lists(args.prefix, entries, classes, args)
        return 0
    lists = find_lists(Path(args.prefix))
    first_items = (item for path in lists for item in islice(read_list(path), 1))
    if not args.pack_label and any(len(item.labels) > 1 for item in first_items):
        print("note: the list holds several labels an image; without --pack-label only the first is packed")
    return pack_lists(lists, args.root, args, args.pack_label)


if __name__ == "__main__":
    sys.exit(run_command(main))
