"""`python -m graph export-torch PREFIX EPOCH -o net.pt2`: a trained network as a `torch.export` program."""

from __future__ import annotations

import argparse
import io

from atomic_file import AtomicFile
from command_line import Parser
from errors import ProjectError
from graph.checkpoint_args import add_checkpoint_args


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    import torch

    from graph.trained import check_same, export_program, load_trained, logits

    trained = load_trained(args.prefix, args.epoch, args.image_size)
    content = io.BytesIO()
    torch.export.save(export_program(trained), content)

    def run(images):
        return logits(module, torch.from_numpy(images)).numpy()

    try:
        with AtomicFile(args.output) as file:
            file.write(content.getbuffer())
            file.complete()
            module = torch.export.load(io.BytesIO(file.temporary.read_bytes())).module()
            worst = check_same(trained, run, "the exported program")
    except OSError as error:
        raise ProjectError(f"{args.output}: cannot be written ({error.strerror}); choose another -o") from error
    print(f"{args.output}: {len(content.getbuffer()) / 1e6:.1f} MB, logits within {worst:.1e} of the graph's")
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
