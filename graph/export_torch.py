"""`python -m graph export-torch PREFIX EPOCH -o net.pt2`: a trained network as a `torch.export` program."""

from __future__ import annotations

import argparse
import io

from command_line import Parser
from graph.checkpoint_args import add_checkpoint_args


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    import torch

    from graph.trained import export_program, load_trained, logits, write_checked

    trained = load_trained(args.prefix, args.epoch, args.image_size)
    content = io.BytesIO()
    torch.export.save(export_program(trained), content)

    def open_written(path):
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()
        return lambda images: logits(module, torch.from_numpy(images)).numpy()

    write_checked(args.output, content.getbuffer(), trained, open_written, "the exported program")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m graph export-torch",
        description="Write a trained network as a torch.export program, from images `data` (any number, 3, H, W; raw "
        "0-255) to logits: torch.export.load(FILE).module()(images).",
        allow_abbrev=False,
    )
    add_checkpoint_args(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .pt2 file to write")
    return parser
