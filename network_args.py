"""Command-line flags for the options of a network, made from the tables in `architectures`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from fractions import Fraction

from architectures import DATA_TYPES, NETWORKS

HELP = {
    "num_classes": "number of classes",
    "data_type": "kind of data, which decides the stem",
    "image_size": "height and width of the images in pixels",
    "drop_out": "probability of dropout before the last layer",
    "bn_mom": "momentum of BatchNorm's moving statistics",
    "workspace": "MB that a convolution may use as workspace on a GPU",
    "se_ratio": "hidden width of an SE block as a share of its channels",
    "no_se": "the plain twin: the network without SE blocks",
    "depth": "number of layers",
    "num_group": "groups of the 3 x 3 convolutions",
}


def fraction(text: str) -> float:
    """`0.0625` or `1/16` -> 0.0625; an argparse type."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.0625 or 1/16") from None


def add_network_option_args(parser: argparse.ArgumentParser) -> None:
    """One flag for every option that some network has; a flag that is not given leaves no attribute."""
    group = parser.add_argument_group(
        "options of the network", "Defaults are those of the first network that has the option."
    )
    for name, default in _defaults().items():
        shown = "that of the data type" if default is None else default
        arguments = {"default": argparse.SUPPRESS, "help": f"{HELP[name]} (default: {shown})"}
        if isinstance(default, bool):
            arguments["action"] = "store_true"
        elif isinstance(default, str):
            arguments["choices"] = sorted(DATA_TYPES)
        else:
            arguments["type"] = fraction if isinstance(default, float) else int
            arguments["metavar"] = "X" if isinstance(default, float) else "N"
        group.add_argument(f"--{name.replace('_', '-')}", **arguments)


def given_options(args: argparse.Namespace) -> dict[str, object]:
    """The options that were given, as keywords for `get_symbol` or `get_network`."""
    return {name: getattr(args, name) for name in _defaults() if hasattr(args, name)}


def _defaults() -> dict[str, object]:
    """Option -> its default in the first network that has it."""
    defaults: dict[str, object] = {}
    for options in NETWORKS.values():
        for field in fields(options):
            defaults.setdefault(field.name, field.default)
    return defaults
