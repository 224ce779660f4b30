"""`python -m gluon export NETWORK --params PREFIX EPOCH -o OUT`: deployment files of a trained network."""

from __future__ import annotations

import argparse
import sys

from architectures import NETWORKS, network_options
from errors import UsageError, run_command
from network_args import add_network_option_args, given_options


def epoch_number(text: str) -> int:
    """`7` or `0007` -> 7."""
    if not text.isdigit():
        raise UsageError(f"--params needs a prefix and the number of an epoch, not {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gluon", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export",
        help="write a network with trained parameters for deployment",
        description="Write OUT-symbol.json and OUT-0000.params of a network, from images (raw 0-255) to logits, for "
        "mx.mod.Module and SymbolBlock.imports.",
        allow_abbrev=False,
    )
    export.add_argument("network", metavar="NETWORK", help=f"one of {', '.join(NETWORKS)}")
    files = export.add_argument_group("files")
    files.add_argument(
        "--params", nargs=2, required=True, metavar=("PREFIX", "EPOCH"),
        help="the checkpoint to take the parameters from: PREFIX-EPOCH.params, written by any engine",
    )  # fmt: skip
    files.add_argument("-o", "--output", required=True, metavar="OUT", help="prefix of the files to write")
    add_network_option_args(export)
    return parser


def export(args: argparse.Namespace) -> None:
    options = given_options(args)
    side = network_options(args.network, **options).image_size
    prefix, epoch = args.params[0], epoch_number(args.params[1])

    from training.checkpoint import check_params, load_params

    params = load_params(prefix, epoch)
    from gluon import get_network
    from gluon.export import parameter_shapes, traced, write

    symbol = traced(get_network(args.network, **options))
    shapes = parameter_shapes(symbol, (3, side, side))
    check_params(shapes, params, f"{prefix}-{epoch:04d}.params")
    for path in write(symbol, {name: params[name] for name in shapes}, args.output):
        print(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    export(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
