"""Several MXNet contexts stand for several GPUs: the same updates as one device, statistics of each device's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe

import numpy as np
import pytest

from engines.base import IGNORED_LABEL, Batch, even_shares
from engines.group import PeerLost, StarGroup
from engines.mxnet_common import seed_update, training_rows
from engines.symbol_engine import SymbolEngine
from errors import ProjectError, SaidElsewhere, UsageError
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from mxnet_compat import mx
from training.initializer import initial_state

ROWS, SIZE, CLASSES, UPDATES = 32, 12, 4, 20
LR, MOMENTUM, WD = 0.02, 0.9, 1e-3
INPUTS = ("data", "softmax_label")


def network(batch_norm: bool) -> mx.sym.Symbol:
    net = mx.sym.var("data") / 128
    for number, stride in (("1", 1), ("2", 2)):
        net = mx.sym.Convolution(
            net, kernel=(3, 3), num_filter=8, stride=(stride, stride), no_bias=batch_norm, name=f"conv{number}"
        )
        if batch_norm:
            net = mx.sym.BatchNorm(net, fix_gamma=False, eps=2e-5, momentum=0.9, name=f"bn{number}")
        net = mx.sym.Activation(net, act_type="relu", name=f"relu{number}")
    net = mx.sym.FullyConnected(mx.sym.mean(net, axis=(2, 3)), num_hidden=CLASSES, name="fc")
    return mx.sym.SoftmaxOutput(net, name="softmax", use_ignore=True, ignore_label=IGNORED_LABEL)


def first_state(symbol: mx.sym.Symbol):
    inputs = {"data": (1, 3, SIZE, SIZE), "softmax_label": (1,)}
    return initial_state(parameter_shapes(parse(symbol.tojson()), inputs), seed=2)


def make_batches(count: int = UPDATES, rows: int = ROWS) -> list[Batch]:
    """Noise whose first channel tells the class; every fifth batch ends in padding."""
    rng = np.random.default_rng(5)
    batches = []
    for index in range(count):
        labels = rng.integers(0, CLASSES, rows)
        images = rng.integers(0, 100, (rows, 3, SIZE, SIZE), dtype=np.uint8)
        images[:, 0] += (labels * 30).astype(np.uint8)[:, None, None]
        pad = 5 if index % 5 == 4 else 0
        images[rows - pad :], labels[rows - pad :] = images[:pad], labels[:pad]
        batches.append(Batch(images, labels, pad))
    return batches


def trained(symbol, devices: int, *, kv_store: str = "device", rows: int = ROWS, state=None, batches=None):
    """The state after training from the initial one, and the loss of every update."""
    contexts = [mx.cpu(index) for index in range(devices)]
    engine = SymbolEngine(
        symbol, contexts, image_shape=(3, SIZE, SIZE), batch_size=rows, momentum=MOMENTUM, wd=WD, kv_store=kv_store
    )
    engine.set_state(state or first_state(symbol))
    losses = []
    for batch in batches or make_batches(rows=rows):
        engine.train_batch(batch, LR)
        losses.append(engine.read_metrics().loss)
    for arrays in engine._module._exec_group.param_arrays:
        # Devices whose gradients were not summed would part from each other.
        assert all((array.asnumpy() == arrays[0].asnumpy()).all() for array in arrays)
    return engine.get_state(), losses


def assert_close(left, right, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    for one, other in ((left.params, right.params), (left.optimizer, right.optimizer)):
        assert list(one) == list(other)
        for name, expected in other.items():
            np.testing.assert_allclose(one[name], expected, rtol=rtol, atol=atol, err_msg=name)


@pytest.fixture(params=["in the KVStore", "outside"])
def update_place(request, monkeypatch):
    """Where MXNet's optimizer runs."""
    monkeypatch.setenv("MXNET_UPDATE_ON_KVSTORE", "1" if request.param == "in the KVStore" else "0")
    return request.param


@pytest.mark.parametrize(("devices", "kv_store"), [(2, "device"), (4, "device"), (2, "local")])
def test_without_batchnorm_devices_do_not_matter(update_place, devices, kv_store):
    symbol = network(batch_norm=False)
    one, one_losses = trained(symbol, 1)
    several, losses = trained(symbol, devices, kv_store=kv_store)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    assert_close(several, one)


@pytest.mark.parametrize(("rows", "devices"), [(32, 3), (11, 4), (6, 4)])
def test_uneven_batches_count_every_row_once(update_place, rows, devices):
    symbol = network(batch_norm=False)
    one, one_losses = trained(symbol, 1, rows=rows)
    several, losses = trained(symbol, devices, rows=rows)
    np.testing.assert_allclose(losses, one_losses, rtol=1e-4)
    assert_close(several, one, rtol=1e-3)


def reference(symbol, devices: int):
    """Training with statistics of each device's own, written down: gradients summed, moving statistics kept apart.

    Returns parameters, moving statistics averaged, and momentum.
    """
    state = first_state(symbol)
    weights = {key[4:]: value.copy() for key, value in state.params.items() if key.startswith("arg:")}
    own_aux = [{k[4:]: v.copy() for k, v in state.params.items() if k.startswith("aux:")} for _ in range(devices)]
    momentum = {name: np.zeros_like(value) for name, value in weights.items()}
    for batch in make_batches():
        total = {name: np.zeros_like(value) for name, value in weights.items()}
        for index, (images, labels) in enumerate(shards(batch, devices)):
            executor = symbol.simple_bind(mx.cpu(), data=images.shape, softmax_label=labels.shape)
            for name, value in weights.items():
                executor.arg_dict[name][:] = value
            for name, value in own_aux[index].items():
                executor.aux_dict[name][:] = value
            executor.forward(
                is_train=True, data=mx.nd.array(images, dtype="float32"), softmax_label=mx.nd.array(labels)
            )
            executor.backward()
            mx.nd.waitall()
            for name in weights:
                total[name] += executor.grad_dict[name].asnumpy()
            own_aux[index] = {name: array.asnumpy() for name, array in executor.aux_dict.items()}
        for name in weights:
            nag(weights[name], momentum[name], total[name] / batch.valid, WD * name.endswith(("_weight", "_gamma")))
    aux = {name: np.mean([own[name] for own in own_aux], axis=0) for name in own_aux[0]}
    return weights, aux, momentum


def shards(batch: Batch, devices: int):
    """Images and labels of every device: equal parts of the rows that count, filled up with repeats of their own."""
    share = len(batch.labels) // devices
    for part in np.array_split(np.arange(batch.valid), devices):
        rows = np.resize(part, share)
        labels = np.where(np.arange(share) < len(part), batch.labels[rows], IGNORED_LABEL)
        yield batch.images[rows], labels


def nag(weight: np.ndarray, momentum: np.ndarray, gradient: np.ndarray, wd: float) -> None:
    """MXNet's Nesterov update: the momentum's weight decay is that of the new weight."""
    before = MOMENTUM * momentum
    step = LR * (gradient + wd * weight)
    weight += -before + (MOMENTUM + 1) * (before - step)
    momentum[:] = before - LR * (gradient + wd * weight)


@pytest.mark.parametrize("devices", [2, 4])
def test_batchnorm_takes_the_statistics_of_its_own_device(update_place, devices):
    symbol = network(batch_norm=True)
    state, losses = trained(symbol, devices)
    assert losses[-1] < losses[0]
    weights, aux, momentum = reference(symbol, devices)
    for kind, arrays, found in (("arg", weights, state.params), ("aux", aux, state.params)):
        for name, expected in arrays.items():
            np.testing.assert_allclose(found[f"{kind}:{name}"], expected, rtol=1e-3, atol=1e-5, err_msg=name)
    for name, expected in momentum.items():
        np.testing.assert_allclose(state.optimizer[f"momentum:{name}"], expected, rtol=1e-2, atol=1e-5, err_msg=name)
    single, _ = trained(symbol, 1)
    assert abs(single.params["aux:bn2_moving_var"] - aux["bn2_moving_var"]).max() > 1e-4, "the test tells nothing"


def test_state_moves_between_the_places_of_the_update(monkeypatch):
    symbol, batches = network(batch_norm=True), make_batches()
    results = []
    for first, second in (("1", "1"), ("0", "0"), ("1", "0"), ("0", "1")):
        monkeypatch.setenv("MXNET_UPDATE_ON_KVSTORE", first)
        state, _ = trained(symbol, 2, batches=batches[:10])
        monkeypatch.setenv("MXNET_UPDATE_ON_KVSTORE", second)
        results.append(trained(symbol, 2, batches=batches[10:], state=state)[0])
    assert set(results[0].optimizer) == {f"momentum:{name}" for name in symbol.list_arguments() if name not in INPUTS}
    for other in results[1:]:
        assert_close(other, results[0])


def test_shares_and_padding_are_even():
    assert even_shares(32, 4) == [8, 8, 8, 8]
    assert even_shares(6, 4) == [2, 2, 1, 1]
    batch = Batch(np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1), np.arange(8), 5)
    images, labels = training_rows(batch, 2)
    assert images.asnumpy().ravel().tolist() == [0, 1, 0, 1, 2, 2, 2, 2]
    assert labels.asnumpy().tolist() == [0, 1, -1, -1, 2, -1, -1, -1]


def test_every_device_and_process_draws_numbers_of_its_own():
    def draw(update: int, rank: int = 0) -> list[tuple]:
        seed_update(7, update, rank)
        return [tuple(mx.nd.random.uniform(shape=(4,), ctx=mx.cpu(index)).asnumpy()) for index in range(3)]

    drawn = [*draw(0), *draw(1), *draw(0, rank=1)]
    assert len(set(drawn)) == len(drawn)
    assert drawn[:3] == draw(0)


def together(work) -> list:
    """What `work(group)`, or its ProjectError, is in each of three processes; here they are threads."""
    pairs = [Pipe() for _ in range(2)]
    groups = [StarGroup(0, 3, [pair[0] for pair in pairs])]
    groups += [StarGroup(rank, 3, [pair[1]]) for rank, pair in enumerate(pairs, 1)]

    def run(group):
        try:
            return work(group)
        except ProjectError as error:
            group.close()
            return error

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(run, groups))


def test_processes_agree():
    assert together(lambda group: group.decide(lambda: group.rank)) == [0, 0, 0]
    assert together(lambda group: group.attempt(lambda: group.rank)) == [0, 1, 2]

    def fail(group, ranks=(1, 2)):
        if group.rank in ranks:
            raise UsageError(f"rank {group.rank} cannot")

    errors = together(lambda group: group.attempt(lambda: fail(group)))
    assert [str(error) for error in errors if not isinstance(error, SaidElsewhere)] == ["rank 1 cannot"]
    assert [error.exit_status for error in errors] == [2, 2, 2]
    errors = together(lambda group: group.decide(lambda: fail(group, ranks=[0])))
    assert [str(error) for error in errors if not isinstance(error, SaidElsewhere)] == ["rank 0 cannot"]
    assert [error.exit_status for error in errors] == [2, 2, 2]

    def leave(group):
        if group.rank == 1:
            group.close()
            return None
        return group.sum([1.0])

    assert [type(found) for found in together(leave)] == [PeerLost, type(None), PeerLost]
