"""`python -m graph export-onnx PREFIX EPOCH -o net.onnx`: a trained network as ONNX, checked before the file is there.

MXNet's own exporter fails on these networks; this one goes through the PyTorch graph.
"""

from __future__ import annotations

import argparse
import logging
import warnings

from atomic_file import AtomicFile
from command_line import Parser
from errors import ProjectError
from graph.checkpoint_args import add_checkpoint_args


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    # ONNX first: whoever lacks it is told so before the network is read.
    import onnxruntime
    import onnxscript  # noqa: F401  PyTorch's exporter needs it and says so less clearly

    from graph.trained import check_same, load_trained

    trained = load_trained(args.prefix, args.epoch, args.image_size)
    content = to_onnx(trained)

    def run(images):
        return session.run(None, {session.get_inputs()[0].name: images})[0]

    try:
        with AtomicFile(args.output) as file:
            file.write(content)
            file.complete()
            session = onnxruntime.InferenceSession(str(file.temporary), providers=["CPUExecutionProvider"])
            worst = check_same(trained, run, "onnxruntime")
    except OSError as error:
        raise ProjectError(f"{args.output}: cannot be written ({error.strerror}); choose another -o") from error
    print(f"{args.output}: {len(content) / 1e6:.1f} MB, logits within {worst:.1e} of the graph's")
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
