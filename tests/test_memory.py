"""Freed memory stays in the process, so that large arrays do not begin with fresh pages again and again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graph.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
# Prints how many pages the system had to give while one array after the other lived and died.
COUNT_PAGES = """
import resource, sys
import numpy as np
from graph.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    np.empty(64 << 20, np.uint8).fill(1)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told")
def test_large_arrays_reuse_pages():
    command = [sys.executable, "-c", COUNT_PAGES]
    pages = {
        how: int(subprocess.run([*command, how], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for how in ("default", "kept")
    }
    assert pages["kept"] <= 20
    assert pages["default"] > 20


def test_nothing_happens_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
