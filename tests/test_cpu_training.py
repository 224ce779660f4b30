"""The graph rewritten for training on CPUs computes what the declared one does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graph.cpu_training import for_cpu_training
from mxnet_compat import mx
from symbols import get_symbol

CASES = {
    "basic": ("se_resnext", {"depth": 8, "data_type": "demo"}, 28),
    "narrow groups": ("se_resnext", {"depth": 50, "num_classes": 7}, 64),
    "pre-activation": ("se_resnet", {"depth": 18, "num_classes": 7}, 64),
    "plain twin": ("se_resnext", {"depth": 50, "num_classes": 7, "no_se": True}, 64),
}


def rewritten(symbol: mx.sym.Symbol) -> mx.sym.Symbol:
    return mx.sym.load_json(for_cpu_training(symbol.tojson()))


def step(symbol: mx.sym.Symbol, size: int) -> dict[str, np.ndarray]:
    """Output, gradients and moving statistics of one training step in float64, from values that names decide."""
    arguments = symbol.list_arguments()
    executor = symbol.simple_bind(mx.cpu(), type_dict=dict.fromkeys(arguments, "float64"), data=(2, 3, size, size))
    random = np.random.default_rng(0)
    for name, array in executor.arg_dict.items():
        scale = {"data": 50.0, "softmax_label": 0.0}.get(name, np.sqrt(2 / np.prod(array.shape[1:])))
        array[:] = mx.nd.array(random.normal(size=array.shape) * scale + name.endswith("_gamma"), dtype=array.dtype)
    executor.forward(is_train=True)
    executor.backward()
    mx.nd.waitall()
    found = {"output": executor.outputs[0], **executor.grad_dict, **executor.aux_dict}
    return {name: array.asnumpy() for name, array in found.items() if name != "softmax_label"}


@pytest.mark.parametrize("case", CASES)
def test_same_output_gradients_and_statistics(case):
    network, options, size = CASES[case]
    symbol = get_symbol(network, **options)
    fast = rewritten(symbol)
    assert fast.list_arguments() == symbol.list_arguments()
    assert fast.list_auxiliary_states() == symbol.list_auxiliary_states()
    assert fast.list_outputs() == symbol.list_outputs()
    expected, found = step(symbol, size), step(fast, size)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-9 * max(np.abs(value).max(), 1e-6), name


@pytest.mark.parametrize("network", ["se_resnext", "se_resnet", "se_inception_v4", "se_inception_resnet_v2"])
def test_the_slow_operators_are_gone_and_every_node_has_a_name_of_its_own(network):
    nodes = json.loads(for_cpu_training(get_symbol(network).tojson()))["nodes"]
    assert not [node["name"] for node in nodes if node["op"] == "broadcast_mul"]
    assert not [node["name"] for node in nodes if node.get("attrs", {}).get("global_pool") == "True"]
    assert len({node["name"] for node in nodes}) == len(nodes)
    narrow = [node["name"] for node in nodes if node["name"].endswith("_conv2_plain")]
    # 32 groups of 4 and 8 channels in the first two stages, of 16 and 32 in the others.
    assert len(narrow) == (3 + 4 if network == "se_resnext" else 0)


def test_other_graphs_stay_as_they_are():
    data = mx.sym.Variable("data")
    body = mx.sym.Convolution(data, num_filter=32, kernel=(3, 3), num_group=32, name="depthwise")
    body = mx.sym.mean(body, axis=1, keepdims=True, name="over_channels")
    body = mx.sym.broadcast_mul(body, mx.sym.Variable("scale", shape=(1, 1, 1, 1)), name="product")
    symbol = mx.sym.Pooling(body, global_pool=True, kernel=(2, 2), pool_type="max", name="maximum")
    assert json.loads(rewritten(symbol).tojson()) == json.loads(symbol.tojson())
