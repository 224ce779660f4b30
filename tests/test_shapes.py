"""Shapes inferred without a framework are MXNet's; tests/test_torch_ops.py compares them op by op as well."""

from __future__ import annotations

import pytest
from test_declare import NETWORKS

from architectures import network_options
from graph.shapes import OUTPUTS, PARAMETERS, infer, parameter_shapes
from graph.symbol_json import GraphError, parse
from graph.torch_ops import OPS
from mxnet_compat import mx
from symbols import get_symbol
from tests.graph_checks import assert_same_shapes, zoo_symbol

S = mx.sym
DATA = S.Variable("data")


@pytest.mark.parametrize("name", NETWORKS)
def test_declared_network(name):
    network, options = NETWORKS[name]
    size = network_options(network, **options).image_size
    assert_same_shapes(get_symbol(network, **options), {"data": (2, 3, size, size)})


# name -> image size
ZOO = {
    "densenet121": 224,
    "googlenet": 224,
    "hrnet_w18_small_v1_c": 224,
    "inceptionv3": 299,
    "mobilenetv2_1.0": 224,
    "resnest14": 224,
    "se_resnext50_32x4d": 224,
    "squeezenet1.0": 224,
    "vgg11_bn": 224,
    "xception": 299,
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo_network(name):
    assert_same_shapes(zoo_symbol(name), {"data": (1, 3, ZOO[name], ZOO[name])})


def test_every_op_that_can_be_executed_has_a_rule():
    assert OUTPUTS.keys() == OPS.keys()
    assert PARAMETERS.keys() <= OPS.keys()


def test_parameters_come_in_the_order_of_the_lists_without_the_inputs():
    symbol = get_symbol("se_resnext", depth=8, data_type="demo")
    inputs = {"data": (1, 3, 28, 28), "softmax_label": (1,)}
    arguments, _, auxiliary = symbol.infer_shape(**inputs)
    theirs = [(f"arg:{n}", s) for n, s in zip(symbol.list_arguments(), arguments) if n not in inputs]
    theirs += [(f"aux:{n}", s) for n, s in zip(symbol.list_auxiliary_states(), auxiliary)]
    assert list(parameter_shapes(parse(symbol.tojson()), inputs).items()) == theirs


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (S.Convolution(DATA, num_filter=4, kernel=(9, 9), name="big"), r"node 'big' .*\(9, 9\) is larger.*\(8, 8\)"),
        (S.Convolution(DATA, num_filter=4, kernel=(1, 1), num_group=2, name="odd"), "'odd' .*3 channels and 4 filters"),
        (S.elemwise_add(DATA, S.Flatten(DATA), name="sum"), r"'sum' .*does not fit .*\(1, 3, 8, 8\), \(1, 192\)"),
        (S.Reshape(DATA, shape=(1, 5, -1), name="cut"), r"'cut' .*does not fit inputs of shapes \(1, 3, 8, 8\)"),
        (S.elemwise_add(DATA, S.Variable("other"), name="sum"), "'sum' .*shape of 'other' cannot be inferred"),
        (S.Correlation(DATA, DATA, name="far"), r"'far' \(Correlation\): the op is not supported"),
    ],
)
def test_what_does_not_fit_is_named(symbol, message):
    with pytest.raises(GraphError, match=message):
        infer(parse(symbol.tojson()), {"data": (1, 3, 8, 8)})


def test_shared_parameter_of_two_shapes():
    weight = S.Variable("w")
    body = S.FullyConnected(DATA, weight, no_bias=True, num_hidden=4, name="one")
    body = S.FullyConnected(body, weight, no_bias=True, num_hidden=4, name="two")
    with pytest.raises(GraphError, match=r"'two' .*'w' has the shape \(4, 6\), and \(4, 4\) is needed"):
        infer(parse(body.tojson()), {"data": (5, 6)})


def test_input_that_the_graph_does_not_have():
    with pytest.raises(GraphError, match="no input 'image'; its first argument is 'data'"):
        infer(parse(S.Flatten(DATA).tojson()), {"image": (1, 3, 8, 8)})
