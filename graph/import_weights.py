"""Weights of other projects' networks in ours: names mapped, constants folded, what differs refused.

A layout (`graph.weight_layouts`) states what cannot be read from a file of weights: names, the eps of BatchNorm, how
the stem pools. The other half of every comparison is read from the graph itself.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from atomic_file import AtomicFile
from command_line import HelpFormatter, Parser
from errors import ProjectError, UsageError
from graph.params_file import write_arrays
from graph.shapes import parameter_shapes
from graph.symbol_json import Attributes, Graph, Node, load
from graph.weight_files import read_weights
from graph.weight_layouts import Layout, find_layout

# Mean and standard deviation of ImageNet's pixels as fractions of 255: what all three layouts were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FULL_SCALE = 255.0

# Counters that PyTorch keeps in every BatchNorm; its arithmetic does not use them.
COUNTERS = "num_batches_tracked"
SHOWN = 3  # differences of one kind that an error message spells out


@dataclass
class Report:
    """What became of every tensor. used: (ours, theirs, shape); made: ours that a constant decides; unused: theirs;
    missing: (ours, theirs); misshaped: (ours, theirs, needed, found)."""

    layout: Layout
    used: list[tuple] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[tuple] = field(default_factory=list)
    misshaped: list[tuple] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text, a tensor a line."""
        text = [f"layout: {self.layout.title}"]
        text += [f"used       {ours} <- {theirs} {shape}" for ours, theirs, shape in self.used]
        text += [f"made       {ours}" for ours in self.made]
        text += [f"unused     {theirs}" for theirs in self.unused]
        text += [f"missing    {ours} (no {theirs})" for ours, theirs in self.missing]
        text += [f"misshaped  {ours} {needed} <- {theirs} {found}" for ours, theirs, needed, found in self.misshaped]
        counts = {name: len(getattr(self, name)) for name in ("used", "made", "unused", "missing", "misshaped")}
        text.append(", ".join(f"{count} {name}" for name, count in counts.items()))
        return text


def match(graph: Graph, shapes: Mapping[str, tuple], source: Mapping[str, np.ndarray], layout: Layout) -> Report:
    """Find the source of every parameter of `graph`.

    shapes: "arg:NAME" and "aux:NAME" -> shape, all parameters. source: arrays in `layout`.
    """
    report = Report(layout)
    taken = set()
    for target, shape in shapes.items():
        ours = target.split(":", 1)[1]
        theirs = layout.source_name(ours)
        if ours.startswith("bn_data_"):
            report.made.append(target)
        elif theirs not in source:
            report.missing.append((target, theirs or "counterpart"))
        else:
            taken.add(theirs)
            found = source[theirs].shape
            # Excitation is a fully connected layer here and a 1 x 1 convolution there: the same numbers.
            flat = found[:2] if found[2:] == (1, 1) and len(shape) == 2 else found
            if flat == tuple(shape):
                report.used.append((target, theirs, found))
            else:
                report.misshaped.append((target, theirs, tuple(shape), found))
    report.unused = [name for name in source if name not in taken]
    return report


def differences(graph: Graph, source: Mapping[str, np.ndarray], report: Report) -> list[str]:
    """Why the weights cannot give their network's answers in `graph`, one phrase a reason; empty when they do."""
    return _structural(graph, source, report.layout) or _by_tensor(report)


def _structural(graph: Graph, source: Mapping[str, np.ndarray], layout: Layout) -> list[str]:
    nodes = {node.name: node for node in graph.nodes}
    expected = ("bn_data", "conv0", "bn0", "pool0", "fc1", "stage1_unit1_conv1", "stage1_unit1_bn1")
    absent = [name for name in expected if name not in nodes]
    if absent:
        return [f"the graph has no {absent[0]}: it is not a residual network for ImageNet-like data"]
    found = []
    if graph.nodes[nodes["stage1_unit1_bn1"].inputs[0].node].name != "stage1_unit1_conv1":
        found.append(
            "the graph's units are pre-activation (BatchNorm before the convolutions), the source's post-activation"
        )
    own_pool = _pool(nodes["pool0"])
    if own_pool != layout.pool:
        theirs, ours = _pool_text(layout.pool), _pool_text(own_pool)
        found.append(f"the stem pools differently: {theirs} in the source, {ours} in the graph")
    if any(re.fullmatch(layout.deep_stem, name) for name in source):
        found.append("the source's stem is three 3 x 3 convolutions, the graph's one of 7 x 7")
    if any(re.fullmatch(layout.averaged, name) for name in source):
        found.append("the source's shortcuts average before they project, the graph's project with stride 2")
    grouped = source.get(layout.source_name("stage1_unit1_conv2_weight"))
    bottleneck = layout.source_name("stage1_unit1_conv3_weight") in source
    if layout.strides_first and bottleneck and grouped is not None and grouped.shape[0] == grouped.shape[1]:
        found.append("the source strides in the first 1 x 1 convolution of a unit, the graph in the 3 x 3 one")
    return found


def _by_tensor(report: Report) -> list[str]:
    found = []
    squeezed = [row for row in report.misshaped if "_excitation1_weight" in row[0]]
    if squeezed:
        ours, theirs, needed, shape = squeezed[0]
        found.append(
            f"hidden width of the SE blocks: {shape[0]} in the source ({theirs}), {needed[0]} in the graph "
            "(timm rounds it up to a multiple of 8)"
        )
    other = [row for row in report.misshaped if "_excitation" not in row[0]]
    found += _first(f"{theirs} is {shape}, {ours} needs {needed}" for ours, theirs, needed, shape in other)
    found += _first(f"the source has no {theirs} for {ours}" for ours, theirs in report.missing)
    found += _first(f"the graph has no place for {name}" for name in report.unused if not name.endswith(COUNTERS))
    return found


def _first(phrases) -> list[str]:
    phrases = list(phrases)
    rest = len(phrases) - SHOWN
    return phrases[:SHOWN] + ([f"and {rest} more of the kind"] if rest > 0 else [])


def _pool(node: Node) -> tuple:
    read = Attributes(node)
    return (
        read.integers("kernel", ()),
        read.integers("stride", (1, 1)),
        read.integers("pad", (0, 0)),
        read.text("pooling_convention", "valid"),
    )


def _pool_text(pool: tuple) -> str:
    kernel, stride, pad, convention = pool
    padding = f"padding {pad[0]}" if any(pad) else "no padding"
    return f"{kernel[0]} x {kernel[1]} stride {stride[0]}, {padding}{', ceil mode' if convention == 'full' else ''}"


def convert(
    graph: Graph,
    shapes: Mapping[str, tuple],
    source: Mapping[str, np.ndarray],
    report: Report,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> dict[str, np.ndarray]:
    """Parameters of `graph` that give the source's answers on raw 0-255 pixels, float32 in the order of `shapes`.

    mean, std: what the source's images are normalised with, as fractions of 255. Both folds are exact but for one
    rounding: (x - m) / sqrt(v + e) is the source's (x / 255 - mean) / std with m = 255 mean and v = (255 std)^2 - e;
    and v' + e' = v + e moves a BatchNorm to another eps.
    """
    eps = {node.name: Attributes(node).number("eps", 1e-3) for node in graph.nodes if node.op == "BatchNorm"}
    origin = {ours: theirs for ours, theirs, _ in report.used}
    scale = np.array(std, dtype=np.float64) * FULL_SCALE
    made = {
        "arg:bn_data_gamma": np.ones(len(std)),
        "arg:bn_data_beta": np.zeros(len(std)),
        "aux:bn_data_moving_mean": np.array(mean, dtype=np.float64) * FULL_SCALE,
        "aux:bn_data_moving_var": scale**2 - eps["bn_data"],
    }
    params = {}
    for target, shape in shapes.items():
        if target in made:
            array = made[target]
        else:
            array = source[origin[target]].reshape(shape)
            node = target.split(":", 1)[1].removesuffix("_moving_var") if target.endswith("_moving_var") else None
            if node:
                array = array.astype(np.float64) + (report.layout.eps - eps[node])
        params[target] = array.astype(np.float32)
    return params


def import_weights(
    graph: Graph, source: Mapping[str, np.ndarray], image_size: int, mean=IMAGENET_MEAN, std=IMAGENET_STD
) -> tuple[Report, list[str], dict[str, np.ndarray] | None]:
    """Match and convert; returns the report, the differences and, when there are none, the parameters."""
    inputs = {name: (1,) for name in graph.arguments if name.endswith("_label")}
    shapes = parameter_shapes(graph, {"data": (1, 3, image_size, image_size), **inputs})
    report = match(graph, shapes, source, find_layout(source))
    found = differences(graph, source, report)
    return report, found, None if found else convert(graph, shapes, source, report, mean, std)


def three_numbers(text: str) -> tuple[float, float, float]:
    """`0.485,0.456,0.406` -> three floats; an argparse type."""
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers such as 0.485,0.456,0.406") from None
    return red, green, blue


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m graph import-weights",
        description="Convert published weights (GluonCV, timm, Cadene) into the parameters of one of our graphs, with "
        "a report of every tensor. Networks that differ are refused, the difference named.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    files = parser.add_argument_group("files")
    files.add_argument("source", type=Path, metavar="SOURCE", help=".params, .safetensors, or a PyTorch state_dict")
    files.add_argument(
        "--graph", type=Path, required=True, default=argparse.SUPPRESS, metavar="SYMBOL_JSON",
        help="the network to fill: a -symbol.json, of a checkpoint or from `python -m symbols export`",
    )  # fmt: skip
    files.add_argument(
        "-o", "--output", required=True, default=argparse.SUPPRESS, metavar="PREFIX",
        help="writes PREFIX-symbol.json and PREFIX-0000.params",
    )  # fmt: skip
    facts = parser.add_argument_group("facts that the files do not hold")
    facts.add_argument("--image-size", type=int, default=224, metavar="N", help="height and width the graph is for")
    facts.add_argument(
        "--mean", type=three_numbers, default=",".join(map(str, IMAGENET_MEAN)), metavar="R,G,B",
        help="mean that the source subtracts, as fractions of 255",
    )  # fmt: skip
    facts.add_argument(
        "--std", type=three_numbers, default=",".join(map(str, IMAGENET_STD)), metavar="R,G,B",
        help="standard deviation it divides by, as fractions of 255",
    )  # fmt: skip
    facts.add_argument(
        "--compare", default=argparse.SUPPRESS, metavar="MODULE:FUNCTION",
        help="compare logits with the PyTorch network that this function makes, for example "
        "timm.models:seresnext50_32x4d (GluonCV's: python -m gluon compare)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    if min(args.std) <= 0:
        raise UsageError(f"--std must be positive, not {args.std}")
    graph = load(args.graph)
    source = read_weights(args.source)
    report, found, params = import_weights(graph, source, args.image_size, args.mean, args.std)
    print("\n".join(report.lines()))
    if params is None:
        raise UsageError(f"{args.source} does not fit {args.graph}: {'; '.join(found)}")
    if hasattr(args, "compare"):
        from graph.compare_weights import compare_with_torch

        deviation = compare_with_torch(args.compare, source, graph, params, args.image_size, args.mean, args.std)
        print(f"largest difference from the logits of {args.compare}: {deviation:.2g} of the largest")
    _write(args.graph, params, args.output)
    return 0


def _write(symbol_json: Path, params: Mapping[str, np.ndarray], prefix: str) -> None:
    paths = Path(f"{prefix}-symbol.json"), Path(f"{prefix}-0000.params")
    text = symbol_json.read_bytes()
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        write_arrays(paths[1], params)
        with AtomicFile(paths[0]) as file:
            file.write(text)
    except OSError as error:
        raise ProjectError(f"{paths[0].parent}: cannot be written ({error.strerror}); choose another -o") from error
    print(*paths, sep="\n")
