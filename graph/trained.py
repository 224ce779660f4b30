"""A trained network for deployment: `PREFIX-symbol.json` and `PREFIX-EPOCH.params` as a module that gives logits."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, fx

from atomic_file import AtomicFile
from errors import ProjectError, UsageError
from graph.checkpoint_args import DEFAULT_IMAGE_SIZE
from graph.params_file import read_arrays
from graph.symbol_json import Entry, Graph, GraphError, load
from graph.to_torch import LABELLED_OPS, load_params, to_torch

DATA_NAME = "data"
# Results count as the same within this part of the largest logit.
TOLERANCE = 1e-4
# Batches that an exported network is tried with: one image, and a batch that it was not exported with.
CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class Trained:
    """module: eval mode, (N, 3, image_size, image_size) raw 0-255 -> logits (N, classes), any N. arguments: flags of
    the training run; empty when another program wrote the files."""

    module: fx.GraphModule
    image_size: int
    arguments: Mapping[str, object]


def load_trained(prefix: str, epoch: int, image_size: int | None = None) -> Trained:
    """Read a checkpoint that any engine wrote.

    Raises UsageError for files that are missing or damaged, a graph that is not supported, and once for all
    differences between the graph's parameters and the file's.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image-size {image_size} is no size")
    graph = without_loss(load(f"{prefix}-symbol.json"))
    stem = f"{prefix}-{epoch:04d}"
    if not Path(f"{stem}.params").exists():
        raise UsageError(f"{stem}.params: no such file; {saved_epochs(prefix)}")
    params = read_arrays(f"{stem}.params")
    if not isinstance(params, dict):
        raise UsageError(f"{stem}.params: the arrays have no names")
    arguments = training_arguments(Path(f"{stem}.json"))
    size = image_size or int(arguments.get("image_size") or DEFAULT_IMAGE_SIZE)
    module = to_torch(graph, {DATA_NAME: (2, 3, size, size)}).eval()
    try:
        load_params(module, params)
    except UsageError as error:
        raise UsageError(f"{stem}.params: {error}") from None
    return Trained(module, size, arguments)


def saved_epochs(prefix: str) -> str:
    """Which epochs there are under a prefix, in words."""
    stem = Path(prefix)
    numbers = (path.stem.rpartition("-")[2] for path in stem.parent.glob(f"{glob.escape(stem.name)}-*.params"))
    found = sorted(int(number) for number in numbers if number.isdigit() and len(number) >= 4)
    return f"saved epochs: {', '.join(map(str, found))}" if found else f"no epoch of {prefix} is there"


def without_loss(graph: Graph) -> Graph:
    """The graph up to the logits: a SoftmaxOutput or softmax at its end is cut off."""
    (head, *more) = graph.heads
    if more:
        raise GraphError(f"the graph has {len(graph.heads)} outputs; only classifiers with one can be deployed")
    node = graph.nodes[head.node]
    if node.op in (*LABELLED_OPS, "softmax", "SoftmaxActivation"):
        return Graph(graph.nodes, (node.inputs[0],))
    return Graph(graph.nodes, (Entry(head.node, head.output),))


def training_arguments(manifest: Path) -> Mapping[str, object]:
    """Flags of the run that wrote a checkpoint; empty when it has no manifest, or one that is not ours."""
    try:
        arguments = json.loads(manifest.read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def export_program(trained: Trained) -> torch.export.ExportedProgram:
    """The network as a `torch.export` program with input "data" and a free number of rows."""
    rows = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, trained.image_size, trained.image_size)
    return torch.export.export(trained.module, (example,), dynamic_shapes={DATA_NAME: {0: rows}})


def write_checked(
    output: str,
    content: bytes | memoryview,
    trained: Trained,
    open_written: Callable[[Path], Callable[[np.ndarray], np.ndarray]],
    what: str,
) -> None:
    """Write an exported network, which gets its name once what `open_written` makes of the file passes `check_same`."""
    try:
        with AtomicFile(output) as file:
            file.write(content)
            file.complete()
            worst = check_same(trained, open_written(file.temporary), what)
    except OSError as error:
        raise ProjectError(f"{output}: cannot be written ({error.strerror}); choose another -o") from error
    print(f"{output}: {len(content) / 1e6:.1f} MB, logits within {worst:.1e} of the graph's")


def check_same(trained: Trained, run: Callable[[np.ndarray], np.ndarray], what: str) -> float:
    """Compare `run`'s logits for random images with the graph's; returns the largest deviation found.

    The deviation is relative to the largest logit; ProjectError when it is more than TOLERANCE or not a number.
    """
    worst = 0.0
    random = np.random.default_rng(0)
    for rows in CHECKED_BATCHES:
        images = random.uniform(0, 255, (rows, 3, trained.image_size, trained.image_size)).astype(np.float32)
        expected = logits(trained.module, torch.from_numpy(images)).numpy()
        found = np.asarray(run(images))
        if found.shape != expected.shape:
            raise ProjectError(f"{what} gives {found.shape} for {rows} images, the graph {expected.shape}")
        deviation = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
        if not deviation <= TOLERANCE:
            raise ProjectError(f"{what} deviates from the graph by {deviation:.1e} of the largest logit; not written")
        worst = max(worst, deviation)
    return worst


def logits(module: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(images)
