"""`python -m gluon COMMAND`: deployment files of a trained network, and a comparison with GluonCV's."""

from __future__ import annotations

import argparse
import sys

from architectures import NETWORKS, network_options
from command_line import Parser
from errors import UsageError, run_command
from network_args import add_network_option_args, given_options


def epoch_number(text: str) -> int:
    """`7` or `0007` -> 7."""
    if not text.isdigit():
        raise UsageError(f"--params needs a prefix and the number of an epoch, not {text!r}")
    return int(text)


def add_network_args(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The network, its options and its parameters; returns the group of flags that name files."""
    command.add_argument("network", metavar="NETWORK", help=f"one of {', '.join(NETWORKS)}")
    files = command.add_argument_group("files")
    files.add_argument(
        "--params", nargs=2, required=True, metavar=("PREFIX", "EPOCH"),
        help="the checkpoint to take the parameters from: PREFIX-EPOCH.params, written by any engine",
    )  # fmt: skip
    add_network_option_args(command)
    return files


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m gluon", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export_command = commands.add_parser(
        "export",
        help="write a network with trained parameters for deployment",
        description="Write OUT-symbol.json and OUT-0000.params of a network, from images (raw 0-255) to logits, for "
        "mx.mod.Module and SymbolBlock.imports.",
        allow_abbrev=False,
    )
    files = add_network_args(export_command)
    files.add_argument("-o", "--output", required=True, metavar="OUT", help="prefix of the files to write")
    export_command.set_defaults(run=export)
    compare_command = commands.add_parser(
        "compare",
        help="compare logits with a network of GluonCV",
        description="Compare the logits of a network with those of GluonCV's network that its parameters were imported "
        "from (python -m graph import-weights), on random images.",
        allow_abbrev=False,
    )
    files = add_network_args(compare_command)
    files.add_argument("--weights", required=True, metavar="FILE", help=".params of GluonCV's network")
    compare_command.add_argument(
        "--with", dest="other", required=True, metavar="gluoncv:NAME", help="GluonCV's network"
    )
    compare_command.set_defaults(run=compare)
    return parser


def export(args: argparse.Namespace) -> None:
    options = given_options(args)
    side = network_options(args.network, **options).image_size
    params, source = read_checkpoint(args)
    from gluon import get_network
    from gluon.export import parameter_shapes, traced, write
    from training.checkpoint import check_params

    symbol = traced(get_network(args.network, **options))
    shapes = parameter_shapes(symbol, (3, side, side))
    check_params(shapes, params, source)
    for path in write(symbol, {name: params[name] for name in shapes}, args.output):
        print(path)


def compare(args: argparse.Namespace) -> None:
    options = given_options(args)
    resolved = network_options(args.network, **options)
    params, source = read_checkpoint(args)
    from gluon import get_network
    from gluon.compare import deviation, fill
    from gluon.export import parameter_shapes, traced
    from gluon.zoo import gluoncv_network
    from training.checkpoint import check_params

    network = get_network(args.network, **options)
    check_params(parameter_shapes(traced(network), (3, resolved.image_size, resolved.image_size)), params, source)
    fill(network, params)
    other = gluoncv_network(args.other, resolved.num_classes)
    found = deviation(network, other, args.weights, resolved.image_size)
    print(f"largest difference from the logits of {args.other}: {found:.2g} of the largest")


def read_checkpoint(args: argparse.Namespace) -> tuple[dict, str]:
    """The parameters that --params names, and the name of their file."""
    prefix, epoch = args.params[0], epoch_number(args.params[1])
    from training.checkpoint import load_params

    return load_params(prefix, epoch), f"{prefix}-{epoch:04d}.params"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
