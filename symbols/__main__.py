"""`python -m symbols COMMAND`: a declared network as a table, as JSON, as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from architectures import NETWORKS, network_options
from command_line import HelpFormatter, Parser
from errors import ProjectError, UsageError, run_command
from network_args import add_network_option_args, given_options

TABLE_ROW = "{:<44} {:<16} {:>18} {:>12} {:>16}"
DOT_MISSING = (
    "the program `dot` of Graphviz is not installed: apt-get install graphviz (Debian, Ubuntu), brew install graphviz "
    "(macOS), or see graphviz.org; without it, python -m symbols summary shows the layers as a table"
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m symbols", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str, output: str | None = None) -> None:
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=HelpFormatter,
            allow_abbrev=False,
        )  # fmt: skip
        command.add_argument("network", metavar="NETWORK", help=f"one of {', '.join(NETWORKS)}")
        if output:
            command.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help=output)
        add_network_option_args(command)
        command.set_defaults(run=run)

    add("summary", summary, "print the layers of a network with shapes, parameters and multiply-adds")
    add("export", export, "write the graph of a network as MXNet's Symbol JSON", "file to write, usually .json")
    add("plot", plot, "draw the graph of a network with MXNet and Graphviz", "picture to write: .svg, .png or .pdf")
    return parser


def summary(args: argparse.Namespace) -> None:
    """Print a line a layer, then totals and what is counted."""
    from graph.symbol_json import parse
    from symbols import get_symbol_json
    from symbols.summary import layers

    options, side = _options(args)
    found = layers(parse(get_symbol_json(args.network, **options)), (3, side, side))
    print(TABLE_ROW.format("layer", "operator", "output shape", "parameters", "multiply-adds"))
    for layer in found:
        shape = " x ".join(map(str, layer.output_shape))
        print(
            TABLE_ROW.format(
                layer.name, layer.op, shape, f"{layer.parameters:,}" if layer.parameters else "-",
                f"{layer.multiply_adds:,}" if layer.multiply_adds else "-",
            )
        )  # fmt: skip
    parameters = sum(layer.parameters for layer in found)
    multiply_adds = sum(layer.multiply_adds for layer in found)
    print(f"\n{len(found)} layers, {parameters:,} parameters, {multiply_adds / 1e9:.3f} G multiply-adds for one image")
    print(f"Input 3 x {side} x {side}; output shapes without the batch axis.")
    print("Parameters: all arguments; moving statistics are not counted.")
    print("Multiply-adds: convolutions and fully connected layers; one an element for BatchNorm and for SE scaling.")


def export(args: argparse.Namespace) -> None:
    """Write the JSON."""
    import atomic_file
    from symbols import get_symbol_json

    options, _ = _options(args)
    try:
        atomic_file.write_text(args.output, get_symbol_json(args.network, **options))
    except OSError as error:
        raise ProjectError(f"cannot write {args.output}: {error.strerror or error}") from error
    print(args.output)


def plot(args: argparse.Namespace) -> None:
    """Draw the graph; the picture's format is that of the output's suffix."""
    options, side = _options(args)
    kind = args.output.suffix[1:]
    if kind not in ("svg", "png", "pdf"):
        raise UsageError(f"{args.output}: name the picture .svg, .png or .pdf")
    from mxnet_compat import mx
    from symbols import get_symbol

    # Graphviz 0.8, the release that MXNet pins, still keeps this error in a module of its own.
    from graphviz.backend import ExecutableNotFound  # isort: skip - MXNet's check of graphviz comes first

    shapes = {"data": (1, 3, side, side), "softmax_label": (1,)}
    picture = mx.viz.plot_network(get_symbol(args.network, **options), title=args.network, shape=shapes)
    picture.format = kind
    try:
        drawn = picture.pipe()
    except ExecutableNotFound:
        raise ProjectError(DOT_MISSING) from None
    try:
        args.output.write_bytes(drawn)
    except OSError as error:
        raise ProjectError(f"cannot write {args.output}: {error.strerror or error}") from error
    print(args.output)


def _options(args: argparse.Namespace) -> tuple[dict, int]:
    """The options that were given, checked, and the side of the images in pixels."""
    options = given_options(args)
    return options, network_options(args.network, **options).image_size


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(run_command(main))
