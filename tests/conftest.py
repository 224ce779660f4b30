"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os

# Fixed before MXNet or PyTorch is imported: bit-exact results need a fixed number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "2")
