"""Keep freed memory in the process: large activations then do not come back as fresh pages from the system.

glibc takes every block above 32 MB from the kernel and returns it when it is freed, so that each activation of a large
batch is cleared and mapped page by page anew, which can take longer than the arithmetic on it
(benchmarks/results/torch_train.md).
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0


def keep_freed_memory() -> bool:
    """Let this process's C allocator neither map large blocks one by one nor give memory back; True if it will.

    The process then holds as much as it ever needed at once. Nothing happens outside Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_MMAP_MAX, _NONE)) and bool(library.mallopt(_TRIM_THRESHOLD, _NEVER))
