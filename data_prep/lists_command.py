"""The commands `list` and `folder`: images in folders or named by a file -> lists, and packs in one step."""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line import HelpFormatter, Parser
from data_prep.im2rec import add_list_args, add_pack_args, make_lists, pack_lists
from data_prep.lists import file_entries, folder_entries, read_classes


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        f"python -m data_prep {command}", description=description,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("root", type=Path, help="folder that the images lie below")
    parser.add_argument("prefix", help="path and beginning of the name of what is written")
    parser.add_argument(
        "--from", dest="source", type=Path,
        help="file of `path label` lines, or table .csv of path,label[,label...]; unset: a class for every folder",
    )  # fmt: skip
    parser.add_argument("--classes", type=Path, help="file of class names, one a line, in the order of their labels")
    add_list_args(parser)
    return parser


def _make(args: argparse.Namespace) -> list[Path]:
    classes = read_classes(args.classes) if args.classes else None
    if args.source is not None:
        classes, entries = file_entries(args.source, args.root, classes)
    else:
        classes, entries = folder_entries(args.root, True, args.exts, classes)
    return make_lists(args.prefix, entries, classes, args)


def main(argv: list[str] | None = None) -> int:
    """The command `list`."""
    args = _parser("list", "Write a .lst of images, or its parts, and the names of the classes.").parse_args(argv)
    _make(args)
    return 0


def folder_main(argv: list[str] | None = None) -> int:
    """The command `folder`: `list`, then `im2rec` on what it wrote."""
    parser = _parser("folder", "Pack the images of a folder in one step: list, then im2rec.")
    add_pack_args(parser)
    args = parser.parse_args(argv)
    return pack_lists(_make(args), args.root, args)
