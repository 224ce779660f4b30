"""The PyTorch engine on a GPU against itself on the CPU; needs PyTorch with CUDA, and no MXNet.

pip install pytest pytest-timeout; python -m pytest tests/test_torch_gpu.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from bright_corners import bright_corners

from conftest import ROOT, read_lines
from engines.base import Batch, TrainState
from engines.torch_engine import TorchEngine
from errors import UsageError
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from symbols import get_symbol_json
from training.initializer import initial_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")

GPU = "cuda:0"
IMAGE_SHAPE, ROWS, CLASSES, LR = (3, 16, 16), 32, 10, 0.0005


@pytest.fixture(scope="module")
def symbol() -> str:
    return get_symbol_json("se_resnext", depth=8, data_type="cifar10", num_classes=CLASSES, image_size=16)


def first_state(symbol: str) -> TrainState:
    inputs = {"data": (ROWS, *IMAGE_SHAPE), "softmax_label": (ROWS,)}
    return initial_state(parameter_shapes(parse(symbol), inputs), 0)


def batches(count: int) -> list[Batch]:
    return bright_corners(count, ROWS, IMAGE_SHAPE, CLASSES)


def trained(symbol: str, state: TrainState, data: list[Batch], device: str = GPU, lr: float = LR, **options):
    """(engine, its losses over the batches)."""
    engine = TorchEngine(symbol, image_shape=IMAGE_SHAPE, batch_size=ROWS, device=device, tf32=False, **options)
    engine.set_state(state)
    found = []
    for batch in data:
        engine.train_batch(batch, lr)
        found.append(engine.read_metrics().loss)
    return engine, found


@pytest.mark.parametrize("optimizer", ["sgd", "nag", "adam"])
def test_a_run_moves_between_cpu_and_gpu(symbol, optimizer):
    data = batches(30)
    _, expected = trained(symbol, first_state(symbol), data, "cpu", optimizer=optimizer)
    state, found = first_state(symbol), []
    for start, device in ((0, GPU), (10, "cpu"), (20, GPU)):
        engine, part = trained(symbol, state, data[start : start + 10], device, optimizer=optimizer)
        state, found = engine.get_state(), found + part
    # Adam makes steps of one size out of gradients near zero, whatever their sign.
    np.testing.assert_allclose(found, expected, rtol=5e-3 if optimizer == "adam" else 1e-3)
    assert state.updates == 30
    assert all(np.isfinite(array).all() for array in state.params.values())


def test_predictions_are_those_of_the_cpu(symbol):
    (batch,) = batches(1)
    # With statistics of its own: initial ones leave raw pixels as large as they are, and one class all the probability.
    state = trained(symbol, first_state(symbol), batches(10), "cpu", lr=0.01)[0].get_state()
    engines = [trained(symbol, state, [], device)[0] for device in ("cpu", GPU)]
    expected, found = (engine.predict(batch) for engine in engines)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"memonger": True}, {"accumulate": 4}, {"compile": True}],
    ids=str,
)
def test_every_mode_learns_as_float32_does(symbol, options):
    data = batches(30)
    _, expected = trained(symbol, first_state(symbol), data, lr=0.01)
    engine, found = trained(symbol, first_state(symbol), data, lr=0.01, **options)
    # Coarser numbers, and BatchNorm over micro-batches, lead elsewhere, but not far in the first updates.
    same = "dtype" not in options and "accumulate" not in options
    np.testing.assert_allclose(found[:10], expected[:10], rtol=2e-3 if same else 0.15)
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.2
    assert (engine.get_state().loss_scale is not None) == (options.get("dtype") == "float16")
    # Weights, gradients and momentum at least.
    assert engine.peak_memory() > 3 * sum(array.nbytes for array in engine.get_state().params.values()) / 2


def test_a_gpu_that_is_not_there_is_refused(symbol):
    with pytest.raises(UsageError, match="there is no GPU 99; PyTorch sees"):
        TorchEngine(symbol, image_shape=IMAGE_SHAPE, batch_size=ROWS, device="cuda:99")


@pytest.mark.parametrize("flags", ["--dtype bfloat16", "--no-tf32", "--compile --dtype float16"])
def test_the_trainer_uses_the_gpu_and_goes_on_on_the_cpu(train_flags, tmp_path, flags):
    run = {"engine": "torch", "epochs": 1, "lr": 0.01, "batch_size": 16, "lr_steps": ""}
    command = [sys.executable, str(ROOT / "train_se_resnext.py")]
    on_gpu = [*train_flags("run", **run), "--gpus", "0", *flags.split()]
    done = subprocess.run([*command, *on_gpu], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "model" / "run-0001.json").read_text())
    assert manifest["arguments"]["gpus"] == [0]
    on_cpu = train_flags("run", **{**run, "epochs": 2, "resume": True})
    done = subprocess.run([*command, *on_cpu], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_lines(tmp_path / "log" / "run") if line["type"] == "train"]
    assert losses
    assert np.isfinite(losses).all()
