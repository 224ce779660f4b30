"""The Gluon networks are the declared graphs: the same nodes when traced, the same numbers when executed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from architectures import NETWORKS
from errors import OptionError
from gluon import get_network
from mxnet_compat import mx
from symbols import get_symbol
from training.initializer import initial_array

CLASSES = 7
ROWS = 2
# One small and one full-size network a family, and plain twins: network, options, side of the images in pixels.
CASES = {
    "se_resnext-20": ("se_resnext", {"depth": 20, "data_type": "cifar10"}, 32),
    "se_resnext-50": ("se_resnext", {"depth": 50}, 64),
    "se_resnext-18-plain": ("se_resnext", {"depth": 18, "no_se": True}, 64),
    "se_resnet-14": ("se_resnet", {"depth": 14, "data_type": "cifar10"}, 32),
    "se_resnet-101": ("se_resnet", {"depth": 101}, 64),
    "se_resnet-50-plain": ("se_resnet", {"depth": 50, "no_se": True}, 64),
    "se_inception_v4": ("se_inception_v4", {"drop_out": 0.0}, 107),
    "se_inception_v4-plain": ("se_inception_v4", {"drop_out": 0.0, "no_se": True}, 107),
    "se_inception_resnet_v2": ("se_inception_resnet_v2", {"drop_out": 0.0}, 107),
    "se_inception_resnet_v2-plain": ("se_inception_resnet_v2", {"drop_out": 0.0, "no_se": True}, 107),
}
TRACED = [
    *CASES.values(),
    ("se_inception_v4", {"image_size": 299, "drop_out": 0.2}),
    ("se_resnext", {"depth": 269, "num_group": 64, "se_ratio": 1 / 8, "bn_mom": 0.95}),
    ("se_resnet", {"depth": 164, "data_type": "cifar10", "drop_out": 0.3, "workspace": 256}),
]


def operations(symbol) -> list[tuple]:
    """(op, name, attributes, inputs) of every node; attributes of variables concern initialisation alone."""
    nodes = json.loads(symbol.tojson())["nodes"]
    return [
        (
            node["op"],
            node["name"],
            node.get("attrs", {}) if node["op"] != "null" else None,
            [(nodes[index]["name"], output) for index, output, *_ in node["inputs"]],
        )
        for node in nodes
    ]


@pytest.mark.parametrize(("network", "options"), [case[:2] for case in TRACED])
def test_traced_network_is_the_symbol(network, options):
    traced = get_network(network, num_classes=CLASSES, **options)(mx.sym.var("data"))
    declared = get_symbol(network, num_classes=CLASSES, **options).get_internals()["fc1_output"]
    assert operations(traced) == operations(declared)


def bound_symbol(network: str, options: dict, size: int, dtype: str):
    """The declared graph without its softmax, bound for training, its parameters filled."""
    symbol = get_symbol(network, num_classes=CLASSES, **options)
    executor = symbol.get_internals()["fc1_output"].simple_bind(
        mx.cpu(), grad_req="write", type_dict={"data": dtype}, data=(ROWS, 3, size, size)
    )
    for name, array in [*executor.arg_dict.items(), *executor.aux_dict.items()]:
        if name != "data":
            array[:] = initial_array(name, array.shape, 1)
    return executor


def parameters_of(executor) -> dict:
    """Its parameters and auxiliary states."""
    arrays = {**executor.arg_dict, **executor.aux_dict}
    del arrays["data"]
    return arrays


def loaded_network(network: str, options: dict, arrays: dict, hybridize: bool):
    """The Gluon network with the arrays of an executor."""
    net = get_network(network, num_classes=CLASSES, **options)
    net.initialize()
    parameters = net.collect_params()
    assert parameters.keys() == arrays.keys()
    for name, array in arrays.items():
        assert parameters[name].shape == array.shape
        parameters[name].cast(array.dtype)
        parameters[name].set_data(array)
    if hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    return net


def assert_close(actual, expected, tolerance: float, smallest: float = 0.0, what: str = "") -> None:
    """Largest difference as a share of the largest expected value; below `smallest` a value is rounding alone."""
    actual, expected = (getattr(array, "asnumpy", lambda array=array: array)() for array in (actual, expected))
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), smallest), what


# A float32 activation that is 0 but for rounding may fall on either side of ReLU's kink and change a gradient by
# percents. Hybridized, the executed operators are the symbol's and the results the same bits. One by one they may
# round in another way: then float64 keeps gradients comparable, while the float32 logits are compared as they are.
@pytest.mark.parametrize(("hybridize", "dtype"), [(True, "float32"), (False, "float64")])
@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_the_symbol(case, hybridize, dtype):
    network, options, size = CASES[case]
    executor = bound_symbol(network, options, size, dtype)
    arrays = {name: array.copy() for name, array in parameters_of(executor).items()}
    images = mx.nd.array(np.random.RandomState(0).uniform(0, 255, (ROWS, 3, size, size)), dtype=dtype)
    head = mx.nd.array(np.random.RandomState(1).normal(size=(ROWS, CLASSES)), dtype=dtype)
    # As numpy arrays at once: an executor that is run again before its results were read may overwrite them.
    inference = executor.forward(is_train=False, data=images)[0].asnumpy()
    training = executor.forward(is_train=True, data=images)[0].asnumpy()
    executor.backward(head)
    mx.nd.waitall()

    net = loaded_network(network, options, arrays, hybridize)
    assert_close(net(images), inference, 1e-5)
    with mx.autograd.record():
        logits = net(images)
    logits.backward(head)
    mx.nd.waitall()
    assert_close(logits, training, 1e-5)
    parameters = net.collect_params()
    largest = max(np.abs(array.asnumpy()).max() for array in executor.grad_dict.values())
    for name, expected in executor.grad_dict.items():
        if name != "data":
            assert_close(parameters[name].grad(), expected, 1e-4, smallest=1e-5 * largest, what=name)
    for name, expected in executor.aux_dict.items():
        assert_close(parameters[name].data(), expected, 1e-5, what=name)


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_without_hybridization(case):
    network, options, size = CASES[case]
    executor = bound_symbol(network, options, size, "float32")
    images = mx.nd.array(np.random.RandomState(0).uniform(0, 255, (ROWS, 3, size, size)))
    expected = executor.forward(is_train=False, data=images)[0].asnumpy()
    net = loaded_network(network, options, parameters_of(executor), hybridize=False)
    assert_close(net(images), expected, 1e-5)


def test_unknown_option_is_refused():
    with pytest.raises(OptionError, match="has no option dept; it has num_classes, "):
        get_network("se_resnext", dept=50)
    with pytest.raises(OptionError, match=", ".join(NETWORKS)):
        get_network("resnext")
