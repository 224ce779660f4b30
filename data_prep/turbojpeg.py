"""The system's libturbojpeg, where there is one."""

from __future__ import annotations

import ctypes
import functools
import sys

from errors import UsageError

# By name, for `ctypes.util.find_library` starts ldconfig or a compiler to find them.
_LIBRARIES = {"darwin": ["libturbojpeg.dylib", "libturbojpeg.0.dylib"], "win32": ["turbojpeg", "libturbojpeg"]}
_LIBRARIES_ELSEWHERE = ["libturbojpeg.so.0", "libturbojpeg.so"]
_HINT = "on Debian and Ubuntu `apt-get install libturbojpeg0`, elsewhere the package turbojpeg or libjpeg-turbo"


@functools.cache
def load_library() -> ctypes.CDLL:
    """Its functions for planes, which came with version 2.0 and are still in 3; UsageError where it is missing."""
    for name in _LIBRARIES.get(sys.platform, _LIBRARIES_ELSEWHERE):
        try:
            return _declare(ctypes.CDLL(name))
        except (OSError, AttributeError):
            # Not there, or too old.
            continue
    raise UsageError(f"--yuv-planes needs the library libturbojpeg, 2.0 or later: {_HINT}")


def has_library() -> bool:
    """Whether `load_library` finds it."""
    try:
        load_library()
    except UsageError:
        return False
    return True


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take; AttributeError when one is missing."""
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjDecompressToYUVPlanes.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong,
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    return library
