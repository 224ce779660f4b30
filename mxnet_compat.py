"""The one place where MXNet 1.9.1 is imported: `from mxnet_compat import mx`.

MXNet is retired and its wheels age, so between it and a present-day Python stand a removed numpy alias, a
removed standard module, and shared libraries that the wheels expect of the system. This module cures what it
can and raises MXNetUnavailable, one line with the way out, for the rest. It also knows MXNet's GPUs.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from errors import ProjectError, UsageError
from install_hints import explain_import_error, explain_missing_library, missing_library

__all__ = ["Gpu", "MXNetUnavailable", "driver_gpus", "gpu_contexts", "gpu_problem", "mx"]

TORCH_WAY_OUT = "--engine torch works without MXNet"

# Every build installs the same folder, so that one must go before another comes.
ALL_BUILDS = "mxnet mxnet-cu112"

# The first compute capability that MXNet's builds hold no code for (mxnet-cu112 1.9.1, read with cuobjdump).
FIRST_UNSUPPORTED_CAPABILITY = (9, 0)

# Attributes of a device in NVIDIA's driver interface (CUdevice_attribute).
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class MXNetUnavailable(ProjectError, ImportError):
    """MXNet cannot be imported here; the message says why and what to install."""


class Gpu(NamedTuple):
    """A GPU as NVIDIA's driver shows it: its name and its compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]


def _require_package() -> None:
    """Refuse early and clearly when the Python package is not there."""
    spec = importlib.util.find_spec("mxnet")
    if spec is None or spec.origin is None:  # without origin: the empty folder of an uninstalled package
        raise MXNetUnavailable(
            "MXNet is not installed: pip install -r requirements.txt "
            f"(NVIDIA GPUs: requirements-cu112.txt); {TORCH_WAY_OUT}"
        )


def _restore_numpy_alias() -> None:
    """Put `numpy.bool` back: numpy 1.24 removed the alias of the built-in `bool`, and MXNet still uses it."""
    import numpy as np

    if int(np.__version__.partition(".")[0]) >= 2:
        raise MXNetUnavailable(
            f"MXNet 1.9.1 needs numpy below 2 and {np.__version__} is installed: "
            f"pip install -r requirements.txt; {TORCH_WAY_OUT}"
        )
    if "bool" not in np.__dict__:  # hasattr would print numpy's warning about the name
        np.bool = builtins.bool


def _restore_distutils() -> None:
    """Make `distutils` importable: Python 3.12 removed it, MXNet needs it, setuptools brings a copy.

    Setuptools hooks its copy in when the interpreter starts, but only from a site directory; importing it
    does the same wherever it lies (PYTHONPATH, `pip install --target`).
    """
    for name in ("distutils.version", "setuptools", "distutils.version"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            cause = error
        else:
            if name != "setuptools":
                return
    raise MXNetUnavailable(
        "MXNet needs distutils, which Python 3.12 dropped and setuptools brings: pip install setuptools"
    ) from cause


def _library_path() -> str:
    """Path of libmxnet.so by MXNet's own search, read from its `libinfo.py` without importing the package."""
    package = Path(importlib.util.find_spec("mxnet").origin).parent
    spec = importlib.util.spec_from_file_location("_mxnet_libinfo", package / "libinfo.py")
    libinfo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(libinfo)
    try:
        return libinfo.find_lib_path()[0]
    except RuntimeError as error:
        raise MXNetUnavailable(
            f"{package} is incomplete, it holds no libmxnet.so: pip uninstall {ALL_BUILDS}, "
            "then pip install -r requirements.txt (NVIDIA GPUs: requirements-cu112.txt)"
        ) from error


def _load_library(path: str | Path) -> None:
    """Load a shared library; what the loader misses of CUDA is taken from the nvidia-*-cu11 wheels.

    The loader names one missing library at a time, and a library that is loaded satisfies every later request
    for its name. So no LD_LIBRARY_PATH is needed, and nothing is loaded that a CPU build does not ask for.
    """
    tried = set()
    while True:
        try:
            ctypes.CDLL(str(path))
            return
        except OSError as error:
            soname = missing_library(error)
            in_wheel = _find_in_wheels(soname) if soname else None
            if in_wheel is None or soname in tried:
                raise MXNetUnavailable(_explain_load_error(path, soname, error)) from error
            tried.add(soname)
            _load_library(in_wheel)


def _find_in_wheels(soname: str) -> Path | None:
    """Path of a library inside the installed nvidia-* wheels, which keep theirs in nvidia/<part>/lib."""
    for entry in sys.path:
        for path in sorted(Path(entry).glob(f"nvidia/*/lib/{soname}")):
            return path
    return None


def _explain_load_error(path: str | Path, soname: str | None, error: OSError) -> str:
    """One line on why MXNet's library does not load and what to install."""
    if soname is None:
        return f"MXNet's library {path} does not load ({error}); {TORCH_WAY_OUT}"
    if soname == "libcuda.so.1":
        return (
            "this MXNet is a CUDA build and the NVIDIA driver (libcuda.so.1) is missing: install the driver, "
            f"or the CPU build: pip uninstall {ALL_BUILDS}, then pip install -r requirements.txt"
        )
    if soname.startswith(("libcu", "libnccl", "libnv")):
        return f"MXNet's CUDA build needs {soname}: pip install -r requirements-cu112.txt"
    return f"MXNet does not load, {explain_missing_library(soname)}; {TORCH_WAY_OUT}"


def _import_mxnet() -> ModuleType:
    """Import MXNet with everything put right first; raises MXNetUnavailable when it cannot be imported."""
    _require_package()
    try:
        _restore_numpy_alias()
        _restore_distutils()
        _load_library(_library_path())
        return importlib.import_module("mxnet")
    except MXNetUnavailable:
        raise
    except ImportError as error:
        cause = explain_import_error(error) or f"{error} (pip install -r requirements.txt)"
        raise MXNetUnavailable(f"MXNet cannot be imported, {cause}; {TORCH_WAY_OUT}") from error


mx = _import_mxnet()


def driver_gpus() -> list[Gpu]:
    """The GPUs that NVIDIA's driver shows to this process, in its order (CUDA_VISIBLE_DEVICES applies).

    Empty without driver or GPU. Asks the driver itself, so that it also answers for MXNet's CPU build.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [_driver_gpu(cuda, ordinal) for ordinal in range(count.value)]


def _driver_gpu(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value))


def gpu_problem(ids: Sequence[int]) -> str | None:
    """Why MXNet cannot compute on the GPUs numbered `ids`, one line with the way out; None when it can."""
    gpus = driver_gpus()
    cuda_build = mx.runtime.Features().is_enabled("CUDA")
    return _explain_gpus(ids, gpus, cuda_build, _mxnet_gpu_count() if cuda_build else 0)


def _mxnet_gpu_count() -> int:
    """How many GPUs a CUDA build of MXNet sees; a CUDA runtime that refuses to start sees none."""
    try:
        return mx.context.num_gpus()
    except mx.MXNetError:
        return 0


def _explain_gpus(ids: Sequence[int], gpus: Sequence[Gpu], cuda_build: bool, visible: int) -> str | None:
    """The text of gpu_problem from what driver and MXNet said: `gpus`, kind of build, number MXNet sees."""
    hopper = "GPUs from Hopper (compute capability 9.0) on need --engine torch (requirements-torch.txt)"
    for i in ids:
        if i in range(len(gpus)) and gpus[i].capability >= FIRST_UNSUPPORTED_CAPABILITY:
            name, (major, minor) = gpus[i]
            return f"MXNet holds no code for GPU {i} ({name}, compute capability {major}.{minor}): {hopper}"
    if not cuda_build:
        return (
            f"this MXNet is the CPU build and cannot see GPU {_listed(ids)}: pip uninstall {ALL_BUILDS}, "
            f"then pip install -r requirements-cu112.txt; {hopper}"
        )
    unseen = [i for i in ids if i not in range(visible)]
    if unseen:
        return (
            f"MXNet cannot see GPU {_listed(unseen)} (the driver shows {len(gpus)}, MXNet {visible}): check "
            f"driver, CUDA_VISIBLE_DEVICES and pip install -r requirements-cu112.txt; {hopper}"
        )
    return None


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def gpu_contexts(ids: Sequence[int]) -> list[mx.Context]:
    """MXNet's contexts for the GPUs numbered `ids`; raises UsageError when MXNet cannot compute on one."""
    problem = gpu_problem(ids)
    if problem is not None:
        raise UsageError(problem)
    return [mx.gpu(i) for i in ids]
