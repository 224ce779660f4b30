"""The PyTorch engine against MXNet: update rules bit for bit, moving runs between engines, exact continuation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from bright_corners import bright_corners

from conftest import ROOT
from engines.base import Batch, NonFiniteLoss, TrainState
from engines.symbol_engine import SymbolEngine
from engines.torch_engine import TorchEngine
from engines.torch_optimizers import Optimizer
from errors import UsageError
from graph.recompute import RecomputedGraph
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from graph.to_torch import to_torch
from mxnet_compat import mx
from symbols import get_symbol
from training.initializer import initial_state
from training.metrics import batch_metrics

IMAGE_SHAPE, ROWS, CLASSES = (3, 16, 16), 16, 10
LR = 0.02
# Rounding turns single ReLUs on or off; the slower a network learns, the longer two engines stay together.
SLOW = 0.0005


def tiny_symbol(**options):
    return get_symbol("se_resnext", depth=8, data_type="cifar10", num_classes=CLASSES, image_size=16, **options)


def batches(count: int, start: int = 0, pad: int = 0) -> list[Batch]:
    return bright_corners(count, ROWS, IMAGE_SHAPE, CLASSES, start, pad)


def first_state(symbol, seed: int = 0) -> TrainState:
    inputs = {"data": (ROWS, *IMAGE_SHAPE), "softmax_label": (ROWS,)}
    return initial_state(parameter_shapes(parse(symbol.tojson()), inputs), seed)


def torch_engine(symbol, **options) -> TorchEngine:
    return TorchEngine(symbol.tojson(), image_shape=IMAGE_SHAPE, batch_size=ROWS, **options)


def mxnet_engine(symbol, **options) -> SymbolEngine:
    return SymbolEngine(symbol, [mx.cpu()], image_shape=IMAGE_SHAPE, batch_size=ROWS, **options)


def losses(engine, data: list[Batch], lr: float = LR) -> list[float]:
    found = []
    for batch in data:
        engine.train_batch(batch, lr)
        found.append(engine.read_metrics().loss)
    return found


def assert_equal_states(left: TrainState, right: TrainState) -> None:
    assert left.updates == right.updates
    for mine, other in ((left.params, right.params), (left.optimizer, right.optimizer)):
        assert list(mine) == list(other)
        for name, array in mine.items():
            assert np.array_equal(array, other[name]), name


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.9), ("sgd", 0.0), ("nag", 0.9), ("nag", 0.0), ("adam", 0.9)])
def test_update_rules_are_those_of_mxnet_bit_for_bit(name, momentum, together):
    data = mx.sym.Variable("data")
    weight = mx.sym.Variable("b_weight", attr={"__lr_mult__": "0.5", "__wd_mult__": "2.0"})
    symbol = mx.sym.FullyConnected(data, num_hidden=7, name="a")
    symbol = mx.sym.FullyConnected(symbol, weight=weight, num_hidden=5, name="b")
    names = [n for n in symbol.list_arguments() if n != "data"]
    shapes = dict(zip(symbol.list_arguments(), symbol.infer_shape(data=(2, 300))[0]))
    rng = np.random.default_rng(0)
    start = {n: rng.normal(size=shapes[n]).astype(np.float32) for n in names}

    options = {"wd": 0.013} if name == "adam" else {"wd": 0.013, "momentum": momentum}
    theirs = mx.optimizer.create(name, sym=symbol, param_idx2name=dict(enumerate(names)), rescale_grad=1 / 3, **options)
    updater = mx.optimizer.get_updater(theirs)
    expected = {n: mx.nd.array(start[n]) for n in names}
    ours = {n: torch.from_numpy(start[n].copy()) for n in names}
    graph = parse(symbol.tojson())
    optimizer = Optimizer(ours, graph, optimizer=name, momentum=momentum, wd=0.013, together=together)
    for update in range(1, 6):
        lr = 0.1 / update
        theirs.lr = lr
        gradients = {n: rng.normal(size=shapes[n]).astype(np.float32) for n in names}
        for index, n in enumerate(names):
            updater(index, mx.nd.array(gradients[n]), expected[n])
        optimizer.update({n: torch.from_numpy(g) for n, g in gradients.items()}, lr, 1 / 3, update)
        for n in names:
            assert np.array_equal(ours[n].numpy(), expected[n].asnumpy()), (n, update)


@pytest.mark.parametrize("optimizer", ["nag", "adam"])
def test_fifty_updates_agree_with_mxnet(optimizer):
    symbol, data = tiny_symbol(), batches(50)
    rate = 0.0001 if optimizer == "adam" else SLOW
    found = []
    for make in (mxnet_engine, torch_engine):
        engine = make(symbol, optimizer=optimizer)
        engine.set_state(first_state(symbol))
        found.append(losses(engine, data, rate))
    assert found[0][-1] < found[0][0]
    assert np.allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.parametrize("order", [(mxnet_engine, torch_engine), (torch_engine, mxnet_engine)])
def test_a_run_moves_between_engines(order):
    symbol = tiny_symbol()
    straight, other = (make(symbol) for make in order)
    straight.set_state(first_state(symbol))
    expected = losses(straight, batches(60), SLOW)
    state, found = first_state(symbol), []
    for part, make in enumerate((order[0], order[1], order[0])):
        engine = make(symbol)
        engine.set_state(state)
        found += losses(engine, batches(20, start=20 * part), SLOW)
        state = engine.get_state()
    assert np.allclose(found, expected, rtol=1e-4)
    reference = straight.get_state()
    assert list(state.params) == list(reference.params)
    assert list(state.optimizer) == list(reference.optimizer)
    assert state.updates == reference.updates == 60


def test_one_update_changes_every_array_as_mxnet_does():
    symbol = tiny_symbol()
    states = []
    for make in (mxnet_engine, torch_engine):
        engine = make(symbol, wd=0.01)
        engine.set_state(first_state(symbol))
        losses(engine, batches(2, pad=3))
        states.append(engine.get_state())
    theirs, ours = states
    for mine, other in ((ours.params, theirs.params), (ours.optimizer, theirs.optimizer)):
        assert list(mine) == list(other)
        for name, array in mine.items():
            assert np.allclose(array, other[name], rtol=1e-3, atol=1e-5), name
    assert np.array_equal(ours.params["arg:bn_data_gamma"], theirs.params["arg:bn_data_gamma"])


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"memonger": True}, {"optimizer": "adam"}]
)
def test_continuing_is_exact_with_dropout(options):
    symbol = tiny_symbol(drop_out=0.4)
    straight = torch_engine(symbol, seed=5, **options)
    straight.set_state(first_state(symbol))
    expected = losses(straight, batches(6))
    first = torch_engine(symbol, seed=5, **options)
    first.set_state(first_state(symbol))
    found = losses(first, batches(3))
    first.predict(batches(1)[0])
    second = torch_engine(symbol, seed=5, **options)
    second.set_state(first.get_state())
    found += losses(second, batches(3, start=3))
    assert found == expected
    assert_equal_states(second.get_state(), straight.get_state())


def test_dropout_masks_follow_seed_and_update():
    symbol = tiny_symbol(drop_out=0.4)
    found = []
    for seed in (1, 1, 2):
        engine = torch_engine(symbol, seed=seed)
        engine.set_state(first_state(symbol))
        found.append(losses(engine, batches(2)))
    assert found[0] == found[1] != found[2]


def test_recomputing_changes_nothing():
    symbol, data = tiny_symbol(), batches(4)
    states = []
    for memonger in (False, True):
        engine = torch_engine(symbol, memonger=memonger)
        engine.set_state(first_state(symbol))
        losses(engine, data)
        states.append(engine.get_state())
    assert_equal_states(*states)


@pytest.mark.parametrize(
    ("network", "options", "units"),
    [
        ("se_resnext", {"depth": 50}, 16),
        ("se_resnet", {"depth": 18}, 8),
        ("se_inception_v4", {}, 17),
    ],
)
def test_recomputed_units_are_those_of_the_network(network, options, units):
    graph = parse(get_symbol(network, **options).tojson())
    assert len(RecomputedGraph(to_torch(graph))) >= units


def test_metrics_are_the_shared_definition_and_leave_padding_out():
    symbol = tiny_symbol()
    engine = torch_engine(symbol)
    engine.set_state(first_state(symbol))
    batch = batches(1, pad=5)[0]
    engine.train_batch(batch, 0.0)
    found = engine.read_metrics()
    assert (found.count, engine.read_metrics().count) == (ROWS - 5, 0)
    # The batch statistics are those of all rows, so the probabilities are read in training mode as well.
    module = engine._module.train()
    with torch.no_grad():
        probabilities = module(torch.from_numpy(batch.images).float(), None).numpy()
    expected = batch_metrics(probabilities[:-5], batch.labels[:-5])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.top1_sum, found.top5_sum) == (expected.top1_sum, expected.top5_sum)


def test_padding_rows_do_not_train():
    symbol = tiny_symbol()
    states = []
    for last_label in (3, 4):
        engine = torch_engine(symbol)
        engine.set_state(first_state(symbol))
        batch = batches(1, pad=1)[0]
        batch.labels[-1] = last_label
        engine.train_batch(batch, LR)
        states.append(engine.get_state())
    assert_equal_states(*states)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_low_precision_learns_with_float32_weights(options):
    symbol = tiny_symbol()
    reference, engine = torch_engine(symbol), torch_engine(symbol, **options)
    found = []
    for each in (reference, engine):
        each.set_state(first_state(symbol))
        found.append(losses(each, batches(12)))
    assert all(array.dtype == np.float32 for array in engine.get_state().params.values())
    assert np.allclose(found[0][:5], found[1][:5], rtol=0.03)
    assert found[1][-1] < 0.8 * found[1][0]
    assert engine.predict(batches(1)[0]).dtype == np.float32


def test_continuing_in_float16_keeps_the_scale_of_gradients():
    symbol = tiny_symbol()
    start = first_state(symbol)
    start.loss_scale = (2.0**40, 7)  # far too high: it halves with every update
    engines = [torch_engine(symbol, dtype="float16") for _ in range(2)]
    engines[0].set_state(start)
    losses(engines[0], batches(3))
    state = engines[0].get_state()
    assert state.loss_scale == (2.0**37, 0)
    engines[1].set_state(state)
    for engine in engines:
        losses(engine, batches(40, start=3))
    states = [engine.get_state() for engine in engines]
    assert states[0].loss_scale == states[1].loss_scale
    assert_equal_states(*states)


def test_an_overflow_in_float16_costs_one_update_and_halves_the_scale():
    symbol = tiny_symbol()
    engine = torch_engine(symbol, dtype="float16")
    engine.set_state(first_state(symbol))
    engine._scaler._scale.fill_(2.0**40)
    before = engine.get_state().params["arg:conv0_weight"]
    engine.train_batch(batches(1)[0], LR)
    assert np.array_equal(engine.get_state().params["arg:conv0_weight"], before)
    assert engine._scaler._scale.item() == 2.0**39


def test_predictions_agree_with_mxnet_and_change_nothing():
    symbol = tiny_symbol()
    probabilities = []
    for make in (mxnet_engine, torch_engine):
        engine = make(symbol)
        engine.set_state(first_state(symbol))
        before = engine.get_state()
        probabilities.append(engine.predict(batches(1)[0]))
        assert_equal_states(engine.get_state(), before)
    assert probabilities[1].shape == (ROWS, CLASSES)
    assert np.allclose(*probabilities, atol=1e-5)  # rounding differs by 1.5e-6 without MXNet's fused kernels


def test_a_loss_that_is_no_number_is_reported_with_its_batch():
    symbol = tiny_symbol()
    engine = torch_engine(symbol)
    engine.set_state(first_state(symbol))
    for batch, lr in zip(batches(3), (LR, float("inf"), LR)):
        engine.train_batch(batch, lr)
    with pytest.raises(NonFiniteLoss) as caught:
        engine.read_metrics()
    assert caught.value.offset == 2


def test_wrong_states_devices_and_combinations_are_refused():
    symbol = tiny_symbol()
    engine = torch_engine(symbol)
    state = first_state(symbol)
    del state.params["arg:conv0_weight"]
    with pytest.raises(UsageError, match="arg:conv0_weight is missing"):
        engine.set_state(state)
    with pytest.raises(UsageError, match="--compile and --memonger"):
        torch_engine(symbol, compile=True, memonger=True)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="PyTorch sees no GPU"):
            torch_engine(symbol, device="cuda:0")


def test_compiled_training_agrees():
    data = mx.sym.Variable("data")
    body = mx.sym.Convolution(data, kernel=(3, 3), num_filter=8, no_bias=True, name="conv")
    body = mx.sym.relu(mx.sym.BatchNorm(body, fix_gamma=False, name="bn"), name="relu")
    body = mx.sym.FullyConnected(mx.sym.mean(body, axis=(2, 3)), num_hidden=CLASSES, name="fc")
    symbol = mx.sym.SoftmaxOutput(body, name="softmax", use_ignore=True, ignore_label=-1)
    found = []
    for compiled in (False, True):
        engine = torch_engine(symbol, compile=compiled)
        engine.set_state(first_state(symbol))
        found.append(losses(engine, batches(5), 0.001))
    assert np.allclose(found[0], found[1], rtol=1e-4)


def test_everything_is_computed_on_the_device():
    done = subprocess.run([sys.executable, "-m", "tests.fake_device"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7
    assert {place for _, *_, place in lines} == {"numberless"}


def test_peak_memory_is_at_least_the_weights():
    assert torch_engine(tiny_symbol()).peak_memory() > 1_000_000
