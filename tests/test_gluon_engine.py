"""The Gluon engine computes what the symbol engine computes, from the same state, and hands its state on.

Hybridized, both execute the same operators in the same order, so on CPUs they agree to the last bit. That is what
most tests ask for: training amplifies a difference in rounding until nothing can be compared.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.base import Batch, NonFiniteLoss
from engines.gluon_engine import GluonEngine
from engines.symbol_engine import SymbolEngine
from gluon import get_network
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from mxnet_compat import mx
from symbols import get_symbol
from training.initializer import initial_state
from training.metrics import batch_metrics

CLASSES = 5
ROWS = 8
TINY = ("se_resnext", {"depth": 8, "data_type": "cifar10"}, 16)
DROPOUT = ("se_resnext", {**TINY[1], "drop_out": 0.3}, 16)
FAMILIES = [
    TINY,
    ("se_resnext", {"depth": 18, "no_se": True}, 32),
    ("se_resnet", {"depth": 14, "data_type": "cifar10"}, 16),
    ("se_inception_v4", {"image_size": 107, "drop_out": 0.0}, 107),
    ("se_inception_resnet_v2", {"image_size": 107, "drop_out": 0.0}, 107),
]


def symbol_engine(case=TINY, devices: int = 1, **arguments) -> SymbolEngine:
    network, options, size = case
    symbol = get_symbol(network, num_classes=CLASSES, **options)
    contexts = [mx.cpu(index) for index in range(devices)]
    return SymbolEngine(symbol, contexts, image_shape=(3, size, size), batch_size=ROWS, **arguments)


def gluon_engine(case=TINY, devices: int = 1, **arguments) -> GluonEngine:
    network, options, _ = case
    net = get_network(network, num_classes=CLASSES, **options)
    return GluonEngine(net, [mx.cpu(index) for index in range(devices)], **arguments)


ENGINES = {"symbol": symbol_engine, "gluon": gluon_engine}


def first_state(case=TINY):
    network, options, size = case
    symbol = get_symbol(network, num_classes=CLASSES, **options)
    inputs = {"data": (1, 3, size, size), "softmax_label": (1,)}
    return initial_state(parameter_shapes(parse(symbol.tojson()), inputs), seed=1)


def batches(count: int, size: int = 16, pad: int = 0) -> list[Batch]:
    """Batches of noise whose first channel tells the class; the last one has `pad` rows of padding."""
    rng = np.random.default_rng(3)
    made = []
    for index in range(count):
        labels = rng.integers(0, CLASSES, ROWS)
        images = rng.integers(0, 120, (ROWS, 3, size, size), dtype=np.uint8)
        images[:, 0] += (labels * 25).astype(np.uint8)[:, None, None]
        made.append(Batch(images, labels, pad if index == count - 1 else 0))
    return made


def train(engine, some: list[Batch], lr: float = 0.02) -> list[float]:
    """The loss of every batch."""
    losses = []
    for batch in some:
        engine.train_batch(batch, lr)
        losses.append(engine.read_metrics().loss)
    return losses


def assert_same_state(left, right) -> None:
    """The same names in the same order, the same bits."""
    assert left.updates == right.updates
    for one, other in ((left.params, right.params), (left.optimizer, right.optimizer)):
        assert list(one) == list(other)
        for name, expected in other.items():
            np.testing.assert_array_equal(one[name], expected, err_msg=name)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case[0])
def test_one_step_gives_the_same_state(case):
    engines = [make(case) for make in ENGINES.values()]
    for engine in engines:
        engine.set_state(first_state(case))
        train(engine, batches(1, case[2]), lr=0.1)
    expected, actual = (engine.get_state() for engine in engines)
    assert any((value != first_state(case).params[name]).any() for name, value in expected.params.items())
    assert_same_state(actual, expected)


@pytest.mark.parametrize("optimizer", ["nag", "sgd", "adam"])
def test_losses_of_50_updates_agree(optimizer):
    losses = []
    for make in ENGINES.values():
        engine = make(DROPOUT, optimizer=optimizer)
        engine.set_state(first_state())
        losses.append(train(engine, batches(50, pad=3), lr=0.001 if optimizer == "adam" else 0.02))
    assert losses[0] == losses[1]
    assert np.mean(losses[1][-5:]) < np.mean(losses[1][:5])


@pytest.mark.parametrize("kv_store", ["device", "local"])
def test_two_contexts_agree(kv_store):
    states = []
    for make in ENGINES.values():
        engine = make(devices=2, kv_store=kv_store)
        engine.set_state(first_state())
        train(engine, batches(3, pad=5))
        engine.get_state()  # averages the moving statistics, which training then continues from
        train(engine, batches(2))
        states.append(engine.get_state())
    assert states[0].optimizer
    assert_same_state(states[1], states[0])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.0}, {"optimizer": "adam"}], ids=["nag", "plain", "adam"])
def test_continued_training_has_the_same_bits(devices, arguments):
    some = batches(6)
    straight = gluon_engine(DROPOUT, devices, **arguments)
    straight.set_state(first_state())
    train(straight, some[:3])
    straight.predict(some[0])
    saved = straight.get_state()
    train(straight, some[3:])
    continued = gluon_engine(DROPOUT, devices, **arguments)
    continued.set_state(saved)
    train(continued, some[3:])
    assert_same_state(continued.get_state(), straight.get_state())


@pytest.mark.parametrize("order", [("symbol", "gluon"), ("gluon", "symbol")])
@pytest.mark.parametrize("optimizer", ["nag", "adam"])
def test_state_moves_between_engines(order, optimizer):
    some = batches(6)
    lr = 0.001 if optimizer == "adam" else 0.02
    first, second = (ENGINES[name](optimizer=optimizer) for name in order)
    first.set_state(first_state())
    train(first, some[:3], lr)
    state = first.get_state()
    second.set_state(state)
    assert_same_state(second.get_state(), state)
    np.testing.assert_allclose(second.predict(some[0]), first.predict(some[0]), rtol=1e-4, atol=1e-6)
    assert train(second, some[3:], lr) == train(first, some[3:], lr)


def test_metrics_are_those_of_the_definition():
    engine = gluon_engine(hybridize=False)
    engine.set_state(first_state())
    (batch,) = batches(1, pad=3)
    engine.train_batch(batch, 0.0)
    reference = symbol_engine()
    reference.set_state(first_state())
    reference.train_batch(batch, 0.0)
    actual, expected = engine.read_metrics(), reference.read_metrics()
    assert actual.count == 5
    assert (actual.top1_sum, actual.top5_sum) == (expected.top1_sum, expected.top5_sum)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    probabilities = engine.predict(batch)
    assert probabilities.shape == (ROWS, CLASSES)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert batch_metrics(probabilities, batch.labels).count == ROWS


def test_loss_that_is_not_finite_is_reported():
    engine = gluon_engine()
    state = first_state()
    state.params["arg:fc1_bias"][0] = np.nan
    engine.set_state(state)
    with pytest.raises(NonFiniteLoss, match="nan"):
        train(engine, batches(1))
