"""Graphs declared without MXNet are those that MXNet declares, to the byte of their JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_symbols import GOLDEN_NETWORKS

from conftest import ROOT
from graph.declare import Variable, operators, write
from graph.symbol_json import GraphError, parse
from mxnet_compat import mx
from symbols import get_symbol, get_symbol_json

NETWORKS = {
    **GOLDEN_NETWORKS,
    "se_resnext_50_plain": ("se_resnext", {"no_se": True}),
    "se_resnext_101_g64": ("se_resnext", {"depth": 101, "num_group": 64, "workspace": 256, "bn_mom": 0.95}),
    "se_resnext_cifar_164": ("se_resnext", {"depth": 164, "data_type": "cifar10", "drop_out": 0.3}),
    "se_resnext_demo": ("se_resnext", {"depth": 20, "data_type": "demo", "num_classes": 7, "se_ratio": 1 / 3}),
    "se_resnet_34": ("se_resnet", {"depth": 34, "drop_out": 0.5}),
    "se_resnet_50_plain": ("se_resnet", {"no_se": True}),
    "se_resnet_cifar_20": ("se_resnet", {"depth": 20, "data_type": "cifar10"}),
    "se_resnet_cifar_164": ("se_resnet", {"depth": 164, "data_type": "cifar10"}),
    "se_inception_v4_299": ("se_inception_v4", {"image_size": 299, "drop_out": 0.0}),
    "se_inception_v4_plain": ("se_inception_v4", {"no_se": True}),
    "se_inception_resnet_v2_plain": ("se_inception_resnet_v2", {"no_se": True, "num_classes": 3}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_json_is_mxnets(name):
    network, options = NETWORKS[name]
    declared, native = get_symbol_json(network, **options), get_symbol(network, **options)
    ours, theirs = json.loads(declared)["nodes"], json.loads(native.tojson())["nodes"]
    for mine, other in zip(ours, theirs):  # before the bytes, so that a failure names the node
        assert mine == other
    assert declared == native.tojson()
    loaded = mx.sym.load_json(declared)
    for names in ("list_arguments", "list_auxiliary_states", "list_outputs"):
        assert getattr(loaded, names)() == getattr(native, names)()


@pytest.mark.parametrize("name", ["se_resnext_cifar_20", "se_inception_resnet_v2"])
def test_reading_and_writing_changes_nothing(name):
    network, options = NETWORKS[name]
    text = get_symbol_json(network, **options)
    assert write(parse(text)) == text


def some_calls(space, data):
    """A graph with what the networks leave out: shared inputs, inputs by name, no bias by default, two readers."""
    weight = space.Variable("shared_weight")
    body = space.Convolution(data, weight=weight, name="a", num_filter=3, kernel=(1, 1), no_bias=True)
    body = space.Convolution(data=body, weight=weight, name="b", num_filter=3, kernel=(1, 1), no_bias=False)
    body = space.Concat(*[space.Pooling(body, name=f"pool{i}", kernel=(1, 1)) for i in range(12)], name="joined")
    body = space.FullyConnected(space.Flatten(body, name="flat"), name="fc", num_hidden=2)
    body = space.batch_dot(rhs=body, lhs=body, name="square", transpose_b=True)
    return space.SoftmaxOutput(space.mean(body, axis=1, name="mean"), space.Variable("target"), name="out")


def test_shared_and_named_inputs():
    ours, theirs = some_calls(operators, Variable("data")), some_calls(mx.sym, mx.sym.Variable("data"))
    assert ours.tojson() == theirs.tojson()
    assert ours.list_arguments() == theirs.list_arguments()


def test_operator_without_a_row_is_named():
    with pytest.raises(AttributeError, match="'Crop'"):
        operators.Crop(Variable("data"), name="crop")


@pytest.mark.parametrize("inputs", [{"weights": Variable("w")}, {"lhs": Variable("w")}])
def test_unknown_input_is_refused(inputs):
    with pytest.raises(GraphError, match=r"'fc' \(FullyConnected\) takes the inputs data, weight, bias"):
        operators.FullyConnected(Variable("data"), name="fc", num_hidden=2, **inputs)


WITHOUT_MXNET = """
import sys
sys.modules["mxnet"] = None
import symbols
assert "numpy" not in sys.modules and "torch" not in sys.modules
symbol = symbols.get_symbol("se_resnext", depth=50)
assert symbol.tojson() == symbols.get_symbol_json("se_resnext", depth=50)
assert symbol.list_arguments()[:2] == ["data", "bn_data_gamma"]
"""


def test_networks_are_declared_where_mxnet_is_not():
    subprocess.run([sys.executable, "-c", WITHOUT_MXNET], cwd=ROOT, check=True, timeout=120)
