"""Environment variables that make MXNet fast on CPUs; they must be set before MXNet is imported, so nothing here does.

MXNet computes with half of the processors unless OMP_NUM_THREADS says otherwise, also where no two of them share a
core. Limiting oneDNN to AVX2 would cure the layouts of grouped convolutions too, but `graph.cpu_training` does so in
the graph, and the convolutions keep the faster instructions.
"""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def cores(topology: Path = TOPOLOGY) -> int:
    """Cores that this process may use; processors of one core (hyper-threads) count once, on Linux."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    processors = os.sched_getaffinity(0)
    try:
        siblings = {(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in processors}
    except OSError:
        return len(processors)
    return len(siblings)


def recommended_environment(contexts: int = 1) -> dict[str, str]:
    """What to set where the user has set nothing. contexts: CPU contexts of all processes on this machine that compute
    at the same time, each with threads of its own.
    """
    return {"OMP_NUM_THREADS": str(max(1, cores() // contexts))}
