"""Deployment files of a Gluon network: the traced graph and its parameters, as `HybridBlock.export` writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from atomic_file import AtomicFile
from errors import ProjectError
from graph.params_file import write_arrays
from mxnet_compat import mx


def traced(net) -> mx.sym.Symbol:
    """The graph of a network, from `data` to its logits."""
    return net(mx.sym.var("data", dtype="float32"))


def parameter_shapes(symbol: mx.sym.Symbol, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """ "arg:NAME" and "aux:NAME" -> shape of everything that the graph needs besides its images."""
    arg_shapes, _, aux_shapes = symbol.infer_shape(data=(1, *image_shape))
    shapes = {f"arg:{n}": s for n, s in zip(symbol.list_arguments(), arg_shapes) if n != "data"}
    shapes.update({f"aux:{n}": s for n, s in zip(symbol.list_auxiliary_states(), aux_shapes)})
    return shapes


def write(symbol: mx.sym.Symbol, params: Mapping[str, np.ndarray], prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `<prefix>-symbol.json` and `<prefix>-0000.params`; returns the two paths.

    params: "arg:NAME" and "aux:NAME" -> array, all that the graph needs. `mx.mod.Module`, after
    `mx.model.load_checkpoint(prefix, 0)`, and `SymbolBlock.imports` read the files. Raises ProjectError when they
    cannot be written.
    """
    graph, arrays = Path(f"{os.fspath(prefix)}-symbol.json"), Path(f"{os.fspath(prefix)}-0000.params")
    try:
        graph.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(arrays, params)
        with AtomicFile(graph) as file:
            file.write(symbol.tojson().encode())
    except OSError as error:
        raise ProjectError(f"{graph.parent}: cannot be written ({error.strerror}); choose another -o") from error
    return graph, arrays
