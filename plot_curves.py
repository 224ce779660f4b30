"""Draw the curves of any number of runs over each other: `plot_curves.py log/*/run.jsonl -o curves.png`."""

from __future__ import annotations

import argparse
import sys

from command_line import HelpFormatter, Parser
from errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        description="Draw training and validation top-1 error, top-5 error and loss of several runs.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "logs",
        nargs="+",
        metavar="LOG",
        help="run.jsonl of a run, its folder, or a text log of MXNet's fit (original SENet.mxnet)",
    )
    parser.add_argument("-o", "--output", default="curves.png", help="the picture; .png or .svg chooses its format")
    parser.add_argument("--x", choices=("epochs", "images", "time"), default="epochs", help="what to draw over")
    parser.add_argument("--title", help="title of the picture")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read the logs, draw the picture, say where it lies."""
    args = build_parser().parse_args(argv)
    # Imported here: `--help` answers without numpy.
    from training.curves import Group, check_picture_path, draw_curves, read_runs, save_picture

    check_picture_path(args.output)
    runs, _ = read_runs(args.logs)
    groups = [Group(run.name, [run]) for run in runs]
    save_picture(draw_curves(groups, args.x, args.title), args.output)
    print(f"{args.output}: curves of {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
