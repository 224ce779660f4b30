"""Arguments of the commands that take a trained network; apart from the code that needs PyTorch."""

from __future__ import annotations

import argparse

DEFAULT_IMAGE_SIZE = 224


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    """PREFIX, EPOCH and --image-size."""
    group = parser.add_argument_group("the trained network")
    group.add_argument("prefix", metavar="PREFIX", help="as given to --model-prefix; PREFIX-symbol.json is the graph")
    group.add_argument("epoch", metavar="EPOCH", type=int, help="epochs done: 7 means PREFIX-0007.params")
    text = f"height and width in pixels (default: the training run's, {DEFAULT_IMAGE_SIZE} if unknown)"
    group.add_argument("--image-size", type=int, metavar="PIXELS", help=text)
