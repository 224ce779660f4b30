"""One run, several engines: the same numbers from the same files, and a run that moves between them."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import read_lines
from graph.params_file import read_arrays


def losses(log_dir) -> list[float]:
    return [line["loss"] for line in read_lines(log_dir) if line["type"] == "train"]


RUN = {"epochs": 3, "lr": 0.01, "frequent": 1, "batch_size": 16, "drop_out": 0}


@pytest.mark.parametrize("engine", ["gluon", "torch"])
def test_same_losses_from_the_same_seed(train, train_flags, tmp_path, engine):
    assert train(train_flags("symbol", engine="symbol", **RUN)) == 0
    assert train(train_flags(engine, engine=engine, **RUN)) == 0
    np.testing.assert_allclose(losses(tmp_path / "log" / engine), losses(tmp_path / "log" / "symbol"), rtol=1e-4)


@pytest.mark.parametrize("other", ["gluon", "torch"])
def test_run_moves_between_engines_at_any_checkpoint(train, train_flags, tmp_path, other):
    assert train(train_flags("straight", engine="symbol", **RUN)) == 0
    for epochs, engine in ((1, "symbol"), (2, other), (3, "symbol")):
        changes = {**RUN, "epochs": epochs, "lr_steps": "2" if epochs == 3 else ""}
        assert train(train_flags("moving", engine=engine, resume=True, **changes)) == 0
    np.testing.assert_allclose(losses(tmp_path / "log" / "moving"), losses(tmp_path / "log" / "straight"), rtol=1e-4)
    straight, moving = (read_arrays(tmp_path / "model" / f"{name}-0003.params") for name in ("straight", "moving"))
    for name, array in straight.items():
        np.testing.assert_allclose(moving[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("engine", ["gluon", "torch"])
def test_resume_is_exact_in_every_engine(train, train_flags, tmp_path, engine):
    flags = {**RUN, "engine": engine, "lr_steps": "", "drop_out": 0.3}
    assert train(train_flags("straight", **{**flags, "epochs": 2})) == 0
    assert train(train_flags("parts", **{**flags, "epochs": 1})) == 0
    assert train(train_flags("parts", **{**flags, "epochs": 2}, resume=True)) == 0
    for extension in ("params", "states"):
        paths = [tmp_path / "model" / f"{name}-0002.{extension}" for name in ("straight", "parts")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_flags_of_pytorch_are_refused_for_mxnet(train, train_flags, capfd):
    assert train(train_flags(engine="symbol", dtype="bfloat16")) == 2
    assert "--engine torch" in capfd.readouterr().err


def test_auto_takes_mxnet_where_it_can(train, train_flags, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    assert read_lines(tmp_path / "log" / "run")[0]["engine"] == "symbol"


def test_mxnet_queues_few_batches(monkeypatch):
    """A signal, and the memory of a run that is ahead, wait for what is queued."""
    from engines.mxnet_common import BATCHES_AHEAD, DeviceMetrics
    from mxnet_compat import mx

    waited = []
    wait = mx.nd.NDArray.wait_to_read
    monkeypatch.setattr(mx.nd.NDArray, "wait_to_read", lambda array: (waited.append(array), wait(array))[1])
    metrics = DeviceMetrics()
    for hits in range(BATCHES_AHEAD + 3):
        labels = mx.nd.array([0] * hits + [1] * (4 - hits))
        metrics.add(mx.nd.array([[0.75, 0.25]] * 4), labels, 4)
    assert [int(row[1].asscalar()) for row in waited] == [0, 1, 2]
    assert metrics.read().count == 4 * (BATCHES_AHEAD + 3)
