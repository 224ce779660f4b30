"""Compare runs: tables, pictures and an HTML report, `python compare.py log/*/run.jsonl -o comparison`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import HelpFormatter, Parser
from errors import ProjectError, UsageError, run_command

if TYPE_CHECKING:
    from training.curves import Group


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        description="Compare runs by epochs, by images seen and by wall-clock time; runs that differ only "
        "in their seed are shown as mean and range. Writes report.html (self-contained), table.md, table.csv "
        "and the curves as .svg and .png.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="run.jsonl of a run, its folder, or a text log of MXNet's fit"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("comparison"), help="folder for the results")
    parser.add_argument("--title", default="Comparison of training runs", help="title of the report")
    parser.add_argument("--no-seed-groups", action="store_true", help="show every run on its own")
    return parser


def draw_pictures(groups: list[Group], folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Draw the curves over every axis into `curves-AXIS.svg` and `.png`.

    Returns title -> SVG for the report, and notes on what could not be drawn.
    """
    from training.curves import X_AXES, draw_curves, picture_bytes, without_axis, write_output

    pictures: dict[str, bytes] = {}
    notes: list[str] = []
    for axis, described in X_AXES.items():
        notes += [
            f"{label}: not drawn {described.title}, its log does not tell" for label in without_axis(groups, axis)
        ]
        try:
            figure = draw_curves(groups, axis)
        except ProjectError as error:
            notes.append(str(error))
            continue
        for kind in ("svg", "png"):
            write_output(folder / f"curves-{axis}.{kind}", picture_bytes(figure, kind))
        pictures[f"Curves {described.title}"] = (folder / f"curves-{axis}.svg").read_bytes()
    return pictures, notes


def uneven_groups(groups: list[Group]) -> list[str]:
    """Notes on groups whose runs ended at different epochs: their curves stop where the shortest does."""
    notes = []
    for group in groups:
        last = sorted(run.epochs[-1]["epoch"] for run in group.runs)
        if last[0] != last[-1]:
            notes.append(f"{group.label}: its runs ended after {last[0]} to {last[-1]} epochs, curves show {last[0]}")
    return notes


def main(argv: list[str] | None = None) -> int:
    """Read the logs, group them, write tables, pictures and report, print the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    # Imported here: `--help` answers without numpy.
    from training.comparison import compare, csv_table, group_by_seed, markdown_table, reading
    from training.curves import Group, read_runs, write_output
    from training.report import html_report

    runs, complaints = read_runs(args.logs)
    groups = [Group(run.name, [run]) for run in runs] if args.no_seed_groups else group_by_seed(runs)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {args.output}: {error.strerror or error}; change -o") from error
    rows = compare(groups)
    pictures, notes = draw_pictures(groups, args.output)
    notes = [f"left out: {complaint}" for complaint in complaints] + uneven_groups(groups) + notes
    command = shlex.join(["python", "compare.py", *argv])
    report = html_report(args.title, rows, pictures, notes, command)
    for name, text in (
        ("table.md", markdown_table(rows)),
        ("table.csv", csv_table(rows)),
        ("report.html", report),
    ):
        write_output(args.output / name, text.encode("utf-8"))
    print(markdown_table(rows))
    for line in reading(rows) + notes:
        print(line)
    print(f"report: {args.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
