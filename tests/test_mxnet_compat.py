"""MXNet imports where it can; where it cannot, one line says what to install. Each case is a process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

RUN_IMPORT = """
import sys
sys.path.insert(0, {root!r})
import errors

def main():
    import mxnet_compat
    {then}

raise SystemExit(errors.run_command(main))
"""

needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="builds small libraries with cc",
)


def import_compat(*, before="", then="pass", options=(), **environment) -> subprocess.CompletedProcess:
    """Import mxnet_compat as a command would, in a new interpreter; `before` and `then` run around it."""
    code = before + RUN_IMPORT.format(root=str(ROOT), then=then)
    env = {name: value for name, value in os.environ.items() if name not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
    env.update(environment)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def packages_without(folder: Path, *prefixes: str) -> dict:
    """Keyword arguments for import_compat: this installation less the packages whose names begin so."""
    for entry in SITE_PACKAGES.iterdir():
        if not entry.name.startswith(prefixes):
            (folder / entry.name).symlink_to(entry)
    return {"options": ["-S"], "PYTHONPATH": str(folder)}


def one_line(process: subprocess.CompletedProcess, status: int = 1) -> str:
    """The error line of a command that failed as it should: without a traceback, with that exit status."""
    assert process.returncode == status, process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------------------- the import


def test_mxnet_imports_and_computes_silently():
    process = import_compat(then="print((mxnet_compat.mx.nd.ones(3) * 2).asnumpy().tolist())")
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, "[2.0, 2.0, 2.0]", "")


def test_numpy_bool_is_the_builtin_as_before_1_24():
    process = import_compat(then="import numpy as np; print(np.bool is bool, mxnet_compat.mx.np.bool is bool)")
    assert process.stdout.strip() == "True True", process.stderr


def test_python_without_distutils_uses_the_one_of_setuptools(tmp_path):
    """Python 3.12 has no distutils; a finder that refuses the standard library's makes any Python so."""
    process = import_compat(
        before=refuse_standard_distutils(),
        then="import distutils; print(distutils.__file__)",
        SETUPTOOLS_USE_DISTUTILS="local",  # the default, except in the setuptools of Python 3.9's venv
        **packages_without(tmp_path, "distutils-precedence"),
    )
    assert process.returncode == 0, process.stderr
    assert "setuptools/_distutils" in process.stdout


def test_without_distutils_and_setuptools(tmp_path):
    line = one_line(
        import_compat(
            before=refuse_standard_distutils(),
            **packages_without(tmp_path, "distutils-precedence", "_distutils_hack", "setuptools"),
        )
    )
    assert "pip install setuptools" in line


def refuse_standard_distutils() -> str:
    return """
import sys

class NoDistutils:
    def find_spec(name, path=None, target=None):
        if name == "distutils":
            raise ModuleNotFoundError("No module named 'distutils'", name="distutils")

sys.meta_path.insert(0, NoDistutils)
"""


def test_mxnet_not_installed(tmp_path):
    line = one_line(import_compat(**packages_without(tmp_path, "mxnet")))
    for words in ("MXNet is not installed", "requirements.txt", "requirements-cu112.txt", "--engine torch"):
        assert words in line


def test_mxnet_uninstalled_but_for_its_folder(tmp_path):
    packages = packages_without(tmp_path, "mxnet")
    (tmp_path / "mxnet").mkdir()
    assert "MXNet is not installed" in one_line(import_compat(**packages))


def test_mxnet_without_its_library(tmp_path):
    packages = packages_without(tmp_path, "mxnet")
    (tmp_path / "mxnet").mkdir()
    for source in (SITE_PACKAGES / "mxnet").iterdir():
        if ".so" not in source.name:
            (tmp_path / "mxnet" / source.name).symlink_to(source)
    assert "holds no libmxnet.so: pip uninstall mxnet mxnet-cu112" in one_line(import_compat(**packages))


def test_a_package_that_mxnet_needs_is_missing(tmp_path):
    line = one_line(import_compat(**packages_without(tmp_path, "requests")))
    assert "No module named 'requests'" in line
    assert "pip install -r requirements.txt" in line


def test_numpy_2(tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("__version__ = '2.3.1'\n", encoding="utf-8")
    line = one_line(import_compat(PYTHONPATH=str(tmp_path)))
    assert "numpy below 2 and 2.3.1 is installed" in line
    assert "pip install -r requirements.txt" in line


def test_unavailable_mxnet_is_an_import_error_too(tmp_path):
    """So that pytest.importorskip and other code that expects ImportError treats it as a missing package."""
    process = import_compat(
        before=f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
try:
    import mxnet_compat
except ImportError as error:
    print(type(error).__name__)
sys.exit()
""",
        **packages_without(tmp_path, "mxnet"),
    )
    assert process.stdout.strip() == "MXNetUnavailable", process.stderr


# ---------------------------------------------------------------------------- shared libraries


def compile_library(path: Path, source: str = "", needs: tuple[str, ...] = ()) -> Path:
    """Compile a shared library that asks the loader for the libraries `needs`, whether they exist or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    build = path.parent / f"{path.name}-build"
    build.mkdir()
    for soname in needs:
        subprocess.run(
            ["cc", "-shared", "-xc", os.devnull, f"-Wl,-soname,{soname}", "-o", str(build / soname)],
            check=True,
        )
    command = ["cc", "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{path.name}", "-Wl,--no-as-needed"]
    command += [f"-L{build}", *(f"-l:{soname}" for soname in needs), "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    shutil.rmtree(build)
    return path


@needs_compiler
@pytest.mark.parametrize(
    ("soname", "words"),
    [
        ("libcudnn.so.8", "MXNet's CUDA build needs libcudnn.so.8: pip install -r requirements-cu112.txt"),
        ("libnccl.so.2", "MXNet's CUDA build needs libnccl.so.2: pip install -r requirements-cu112.txt"),
        ("libnvToolsExt.so.1", "MXNet's CUDA build needs libnvToolsExt.so.1: pip install"),
        ("libcuda.so.1", "the NVIDIA driver (libcuda.so.1) is missing: install the driver, or the CPU build"),
        ("libquadmath.so.99", "the system library libquadmath.so.99 is missing"),
    ],
)
def test_library_that_mxnet_needs_is_missing(tmp_path, soname, words):
    library = compile_library(tmp_path / "libmxnet.so", needs=(soname,))
    assert words in one_line(import_compat(MXNET_LIBRARY_PATH=str(library)))


@needs_compiler
def test_cuda_libraries_are_taken_from_the_wheels(tmp_path):
    """Two wheels, one needing the other, and no LD_LIBRARY_PATH: the missing driver is what remains."""
    library = compile_library(tmp_path / "libmxnet.so", needs=("libcudnn.so.8", "libcublas.so.11", "libcuda.so.1"))
    site = tmp_path / "site"
    compile_library(site / "nvidia" / "cudnn" / "lib" / "libcudnn.so.8", needs=("libcublas.so.11",))
    compile_library(site / "nvidia" / "cublas" / "lib" / "libcublas.so.11")
    line = one_line(import_compat(MXNET_LIBRARY_PATH=str(library), PYTHONPATH=str(site)))
    assert "the NVIDIA driver (libcuda.so.1) is missing" in line


def test_library_that_is_damaged(tmp_path):
    library = tmp_path / "libmxnet.so"
    library.write_bytes(b"not a library")
    assert f"MXNet's library {library} does not load" in one_line(import_compat(MXNET_LIBRARY_PATH=str(library)))


# ---------------------------------------------------------------------------- GPUs

FAKE_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 10; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device == 10 ? "NVIDIA A100" : "NVIDIA H200", size);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device == 10 ? 8 : 9) : attribute == 76 ? 0 : -1;
    return 0;
}
"""

PRINT_GPUS = "print(mxnet_compat.driver_gpus()); mxnet_compat.gpu_contexts({ids})"


@needs_compiler
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (
            [0],
            "the CPU build and cannot see GPU 0: pip uninstall mxnet mxnet-cu112, then pip install -r",
        ),
        ([0, 1], "MXNet holds no code for GPU 1 (NVIDIA H200, compute capability 9.0)"),
        ([5], "this MXNet is the CPU build and cannot see GPU 5"),
    ],
)
def test_gpus_that_the_driver_shows(tmp_path, ids, words):
    compile_library(tmp_path / "libcuda.so.1", FAKE_DRIVER)
    process = import_compat(then=PRINT_GPUS.format(ids=ids), LD_LIBRARY_PATH=str(tmp_path))
    assert "Gpu(name='NVIDIA A100', capability=(8, 0))" in process.stdout
    assert "Gpu(name='NVIDIA H200', capability=(9, 0))" in process.stdout
    line = one_line(process, status=2)
    assert words in line
    assert "GPUs from Hopper (compute capability 9.0) on need --engine torch" in line


def test_a_driver_without_gpu_shows_none(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("builds a small library with cc")
    compile_library(tmp_path / "libcuda.so.1", "int cuInit(unsigned flags) { return 100; }")
    process = import_compat(then="print(mxnet_compat.driver_gpus())", LD_LIBRARY_PATH=str(tmp_path))
    assert process.stdout.strip() == "[]", process.stderr


def test_what_a_cuda_build_says():
    from mxnet_compat import Gpu, _explain_gpus

    ampere, hopper = Gpu("NVIDIA A100", (8, 0)), Gpu("NVIDIA H200", (9, 0))
    assert _explain_gpus([0, 1], [ampere, ampere], True, 2) is None
    assert _explain_gpus([0], [ampere, hopper], True, 2) is None
    assert "no code for GPU 1 (NVIDIA H200" in _explain_gpus([0, 1], [ampere, hopper], True, 2)
    assert "cannot see GPU 1, 2 (the driver shows 1, MXNet 1)" in _explain_gpus([0, 1, 2], [ampere], True, 1)
    assert "cannot see GPU -1" in _explain_gpus([-1], [ampere], True, 1)
