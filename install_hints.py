"""What to install when a shared library or a Python package is missing, in one line for the user."""

from __future__ import annotations

import re

# Shared libraries that our wheels expect of the system -> the Debian and Ubuntu package that holds them.
SYSTEM_PACKAGES = {
    "libGL.so.1": "libgl1",
    "libgomp.so.1": "libgomp1",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libquadmath.so.0": "libquadmath0",
    "libz.so.1": "zlib1g",
}
# What only OpenCV's windows need; the build without windows does all that this project asks of OpenCV.
WINDOW_LIBRARIES = {"libGL.so.1", "libgthread-2.0.so.0"}

# Importable name -> the file that installs it. Everything else that is missing is a defect, not an omission.
REQUIREMENTS = {
    "cv2": "requirements.txt",
    "PIL": "requirements-dev.txt",
    "gluoncv": "requirements.txt",
    "graphviz": "requirements.txt",
    "matplotlib": "requirements.txt",
    "mxnet": "requirements.txt",
    "numpy": "requirements.txt",
    "onnx": "requirements-onnx.txt",
    "onnxruntime": "requirements-onnx.txt",
    "onnxscript": "requirements-onnx.txt",
    "simplejpeg": "requirements.txt",
    "torch": "requirements-torch.txt",
    "tqdm": "requirements.txt",
}

# The dynamic loader's words (glibc) when a library that another one needs is nowhere to be found.
_NOT_FOUND = re.compile(r"(?P<soname>[^\s:]+\.so[.\d]*): cannot open shared object file")


def missing_library(error: BaseException) -> str | None:
    """Name (soname) of the shared library that the loader did not find, None for any other error."""
    match = _NOT_FOUND.search(str(error))
    return match["soname"] if match else None


def explain_missing_library(soname: str) -> str:
    """One line that says how to install the shared library `soname`."""
    package = SYSTEM_PACKAGES.get(soname)
    if package is None:
        return f"the system library {soname} is missing: install the package that holds it"
    line = f"the system library {soname} is missing: apt install {package} (Debian, Ubuntu)"
    if soname in WINDOW_LIBRARIES:
        line += ", or put opencv-python-headless in the place of opencv-python"
    return line


def explain_import_error(error: ImportError) -> str | None:
    """One line on how to cure a failed import; None when the cause is not a missing installation."""
    soname = missing_library(error)
    if soname is not None:
        return explain_missing_library(soname)
    top_level = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name == top_level and top_level in REQUIREMENTS:
        return f"the Python package '{top_level}' is not installed: pip install -r {REQUIREMENTS[top_level]}"
    return None
