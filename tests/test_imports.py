"""Rooms import only what the architecture allows: no MXNet where the project must work without it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MXNET_FREE = ("graph", "data_prep", "training")
MXNET_MODULES = {"mxnet", "mxnet_compat", "symbols", "gluon", "gluoncv"}


def imported_names(path: Path) -> set[str]:
    """Top-level names of every module that `path` imports, at any nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def mxnet_free_files() -> list[Path]:
    files = [path for room in MXNET_FREE for path in sorted((ROOT / room).rglob("*.py"))]
    files += [
        ROOT / "errors.py",
        ROOT / "architectures.py",
        ROOT / "engines" / "base.py",
        ROOT / "plot_curves.py",
        ROOT / "compare.py",
    ]
    files.append(ROOT / "engines" / "torch_engine.py")
    return [path for path in files if path.exists()]


@pytest.mark.parametrize("path", mxnet_free_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_mxnet_import(path):
    assert not imported_names(path) & MXNET_MODULES


def test_architectures_import_nothing():
    assert imported_names(ROOT / "architectures.py") <= {"__future__", "dataclasses", "typing", "errors"}


def test_no_folder_shadows_a_framework():
    assert not {"torch", "mxnet"} & {
        path.name for path in ROOT.rglob("*") if path.is_dir() and ".venv" not in path.parts
    }
