"""The requirements files install what the code imports, and a missing package is explained."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from install_hints import REQUIREMENTS

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".venv", "tests", "benchmarks", "demo_run"}
# Where the name that is imported is not the name that is installed.
PACKAGE_NAMES = {"cv2": "opencv-python", "PIL": "pillow"}
# The parts of CUDA that mxnet-cu112's libmxnet.so asks the loader for (readelf -d), less the driver's.
CUDA_PARTS = ("cublas", "cuda-nvrtc", "cuda-runtime", "cudnn", "cufft", "curand", "cusolver", "nccl", "nvtx")

needs_stdlib_names = pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")


def requirements(name: str) -> dict[str, str]:
    """Package -> version specifier ("" when any will do) of a requirements file and those that it includes."""
    packages = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].partition(";")[0].strip()
        if line.startswith("-r "):
            packages.update(requirements(line[3:].strip()))
        elif line:
            package, specifier = re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups()
            packages[package] = packages.get(package, "") + specifier
    return packages


def third_party_imports(paths) -> set[str]:
    """Top-level names that the files import, at any nesting, from outside the project and the standard library."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    return names - set(sys.stdlib_module_names) - ours


def user_files() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in NOT_OURS]


@needs_stdlib_names
def test_what_users_run_needs_no_more_than_users_install():
    installed = requirements("requirements.txt") | requirements("requirements-onnx.txt")
    imported = third_party_imports(user_files())
    assert {PACKAGE_NAMES.get(name, name) for name in imported} <= set(installed)


@needs_stdlib_names
def test_tests_and_benchmarks_need_no_more_than_developers_install():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    imported = third_party_imports(files) - {path.stem for path in files}
    assert {PACKAGE_NAMES.get(name, name) for name in imported} <= set(requirements("requirements-dev.txt"))


@needs_stdlib_names
def test_every_missing_package_is_explained():
    """A package that users may lack ends a command with one line; `distutils` has its own in mxnet_compat."""
    assert third_party_imports(user_files()) <= set(REQUIREMENTS)


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_following_the_explanation_installs_the_package(name):
    assert PACKAGE_NAMES.get(name, name) in requirements(REQUIREMENTS[name])


def test_both_builds_of_mxnet_are_one_release_in_one_surrounding():
    cpu, cuda = requirements("requirements.txt"), requirements("requirements-cu112.txt")
    assert cpu.pop("mxnet") == cuda.pop("mxnet-cu112")
    assert {f"nvidia-{part}-cu11" for part in CUDA_PARTS} == set(cuda) - set(cpu)
    assert cpu.items() <= cuda.items()
