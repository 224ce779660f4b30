"""MXNet gets one thread a core, shared by the contexts."""

from __future__ import annotations

import os

import pytest

from mxnet_settings import cores, recommended_environment

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")


@pytest.mark.parametrize(("siblings", "expected"), [(["0,4", "1,5", "0,4", "1,5"], 2), (["0", "1", "2", "3"], 4)])
def test_hyper_threads_count_once(siblings, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5})
    for processor, text in zip((0, 1, 4, 5), siblings):
        (tmp_path / f"cpu{processor}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{processor}/topology/thread_siblings_list").write_text(f"{text}\n")
    assert cores(tmp_path) == expected


def test_processors_count_where_the_topology_is_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 3})
    assert cores(tmp_path) == 3


def test_contexts_share_the_cores(monkeypatch):
    monkeypatch.setattr("mxnet_settings.cores", lambda: 8)
    assert recommended_environment() == {"OMP_NUM_THREADS": "8"}
    assert recommended_environment(3) == {"OMP_NUM_THREADS": "2"}
    assert recommended_environment(16) == {"OMP_NUM_THREADS": "1"}
