"""Where MXNet cannot be installed, networks are still declared, counted and trained, under the same names."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from conftest import ROOT, read_lines
from graph.params_file import read_arrays
from symbols import get_symbol

BLOCK_MXNET = "import sys; sys.modules['mxnet'] = None; sys.path.insert(0, '.')\n"

DECLARE = """
from networks import declare
from training.options import parse_args

network = declare(parse_args(["--engine", "torch", "--depth", "50"]), 1000)
print(network.parameters, network.multiply_adds, len(network.shapes))
print(*(name for name in ("gluon", "mxnet_compat", "torch") if name in sys.modules))
"""

TRAIN = """
from errors import run_command
from train_se_resnext import main

sys.exit(run_command(lambda: main(sys.argv[1:])))
"""


def run_without_mxnet(code: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BLOCK_MXNET + code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_declare_and_count():
    done = run_without_mxnet(DECLARE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["27559902 4253065216 335", ""]


def test_train_with_pytorch(train_flags, tmp_path):
    done = run_without_mxnet(TRAIN, *train_flags(engine="torch", epochs=1, lr_steps=""))
    assert done.returncode == 0, done.stderr
    header = read_lines(tmp_path / "log" / "run")[0]
    assert header["engine"] == "torch"
    symbol = get_symbol("se_resnext", depth=8, data_type="demo", num_classes=3, image_size=16)
    assert (tmp_path / "model" / "run-symbol.json").read_text() == symbol.tojson()
    arguments, _, auxiliary = symbol.infer_shape(data=(1, 3, 16, 16))
    shapes = dict(zip(symbol.list_arguments(), arguments)) | dict(zip(symbol.list_auxiliary_states(), auxiliary))
    arrays = read_arrays(tmp_path / "model" / "run-0001.params")
    assert {name.split(":")[1]: array.shape for name, array in arrays.items()} == {
        name: shape for name, shape in shapes.items() if name not in ("data", "softmax_label")
    }
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_engine_of_mxnet_is_refused_in_one_line(train_flags):
    done = run_without_mxnet(TRAIN, *train_flags(engine="symbol", epochs=1, lr_steps=""))
    assert done.returncode == 1
    assert "MXNet is not installed" in done.stderr
    assert "--engine torch works without MXNet" in done.stderr
    assert "Traceback" not in done.stderr


def test_auto_takes_pytorch_and_says_why(train_flags, tmp_path):
    done = run_without_mxnet(TRAIN, *train_flags(engine="auto", epochs=1, lr_steps=""))
    assert done.returncode == 0, done.stderr
    assert "engine torch, because MXNet is not installed" in done.stdout + done.stderr
    assert read_lines(tmp_path / "log" / "run")[0]["engine"] == "torch"
