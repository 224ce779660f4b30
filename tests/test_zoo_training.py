"""GluonCV's networks in the trainer: by every engine, with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import read_lines

SMALL = "gluoncv:cifar_resnet20_v1"
RUN = {"network": SMALL, "depth": None, "epochs": 1, "lr": 1e-4, "lr_steps": "", "frequent": 1}


def losses(log_dir) -> list[float]:
    return [line["loss"] for line in read_lines(log_dir) if line["type"] == "train"]


def test_every_engine_trains_it_alike(train, train_flags, tmp_path):
    for engine in ("symbol", "gluon", "torch"):
        assert train(train_flags(engine, engine=engine, **RUN)) == 0
    expected = losses(tmp_path / "log" / "symbol")
    for engine in ("gluon", "torch"):
        np.testing.assert_allclose(losses(tmp_path / "log" / engine), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"network": "gluoncv:resnet20"}, "did you mean"),
        ({"no_se": True}, "has no --no-se"),
        ({"depth": 50}, "has no --depth"),
        ({"pretrained": True}, "pretrained weights"),
        ({"network": "se_resnext", "depth": 8, "pretrained": True}, "leave it out"),
    ],
    ids=str,
)
def test_mistakes(train, train_flags, capfd, changes, fragment):
    assert train(train_flags(**{**RUN, **changes})) in (1, 2)
    assert fragment in capfd.readouterr().err.strip().splitlines()[-1]


def test_list_prints_our_networks_and_gluoncvs(train, capfd):
    assert train(["--network", "list"]) == 0
    names = capfd.readouterr().out.split()
    assert {"se_resnext", "se_inception_v4", "gluoncv:se_resnext50_32x4d", "gluoncv:mobilenetv2_1.0"} <= set(names)
