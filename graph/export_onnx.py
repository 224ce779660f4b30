"""`python -m graph export-onnx PREFIX EPOCH -o net.onnx`: a trained network as ONNX, checked before the file is there.

MXNet's own exporter fails on these networks; this one goes through the PyTorch graph.
"""

from __future__ import annotations

import argparse
import logging
import warnings

from command_line import Parser
from graph.checkpoint_args import add_checkpoint_args


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    # ONNX first: whoever lacks it is told so before the network is read.
    import onnxruntime
    import onnxscript  # noqa: F401  PyTorch's exporter needs it and says so less clearly

    from graph.trained import load_trained, write_checked

    trained = load_trained(args.prefix, args.epoch, args.image_size)
    content = to_onnx(trained)

    def open_written(path):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]

    write_checked(args.output, content, trained, open_written, "onnxruntime")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m graph export-onnx",
        description="Write a trained network as ONNX: images `data` (any number, 3, H, W; raw 0-255) to `logits`. The "
        "file appears once onnxruntime has computed the graph's logits with it.",
        allow_abbrev=False,
    )
    add_checkpoint_args(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .onnx file to write")
    return parser


def to_onnx(trained) -> bytes:
    """The ONNX model of a `graph.trained.Trained`, weights included."""
    import torch

    from graph.trained import DATA_NAME, export_program

    # It lists what torchvision would add, and PyTorch's own deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            export_program(trained), input_names=[DATA_NAME], output_names=["logits"], dynamo=True, verbose=False
        )
    return program.model_proto.SerializeToString()
