"""Options, depths, names and plain twins of the declared networks; no golden file covers these."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from architectures import (
    DATA_TYPES,
    IMAGENET_DEPTHS,
    INCEPTION_RESNET_V2,
    INCEPTION_V4,
    NETWORKS,
    network_options,
    option_names,
)
from errors import OptionError
from mxnet_compat import mx
from symbols import get_symbol

# Smallest of each kind, with both kinds of units.
SMALL = {
    "basic": ("se_resnext", {"depth": 8, "data_type": "demo"}),
    "bottleneck": ("se_resnext", {"depth": 164, "data_type": "cifar10"}),
    "pre-activation": ("se_resnet", {"depth": 8, "data_type": "fashion-mnist"}),
    "pre-activation bottleneck": ("se_resnet", {"depth": 50}),
    "inception v4": ("se_inception_v4", {}),
    "inception resnet v2": ("se_inception_resnet_v2", {}),
}


def op_nodes(symbol) -> list[dict]:
    return [node for node in json.loads(symbol.tojson())["nodes"] if node["op"] != "null"]


@pytest.mark.parametrize("case", SMALL)
def test_every_node_is_named_by_its_path(case):
    network, options = SMALL[case]
    names = [node["name"] for node in op_nodes(get_symbol(network, **options))]
    assert len(set(names)) == len(names)
    # MXNet names what nobody named after the operator and a counter: convolution12, _plus3.
    ops = {node["op"].lower().lstrip("_") for node in op_nodes(get_symbol(network, **options))}
    assert not [name for name in names if re.sub(r"\d+$", "", name).lstrip("_") in ops - {"softmax"}]


@pytest.mark.parametrize("case", SMALL)
def test_declaring_twice_gives_the_same_graph(case):
    network, options = SMALL[case]
    assert get_symbol(network, **options).tojson() == get_symbol(network, **options).tojson()


@pytest.mark.parametrize("case", SMALL)
def test_plain_twin_has_the_same_names_without_the_se_blocks(case):
    network, options = SMALL[case]
    full, twin = get_symbol(network, **options), get_symbol(network, **options, no_se=True)
    kept = [name for name in full.list_arguments() if "_excitation" not in name]
    assert twin.list_arguments() == kept != full.list_arguments()
    assert twin.list_auxiliary_states() == full.list_auxiliary_states()
    size = network_options(network, **options).image_size
    shapes = dict(zip(full.list_arguments(), full.infer_shape(data=(1, 3, size, size))[0]))
    assert twin.infer_shape(data=(1, 3, size, size))[0] == [shapes[name] for name in kept]


@pytest.mark.parametrize("network", ["se_resnext", "se_resnet"])
@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_imagenet_depth_counts_the_layers(network, depth):
    nodes = op_nodes(get_symbol(network, depth=depth))
    weighted = [n["name"] for n in nodes if n["op"] in ("Convolution", "FullyConnected")]
    on_the_path = [name for name in weighted if not name.endswith("_sc") and "_excitation" not in name]
    assert len(on_the_path) == depth


@pytest.mark.parametrize("network", ["se_resnext", "se_resnet"])
@pytest.mark.parametrize("depth", [8, 20, 56, 110, 158, 164, 173])
def test_cifar_depth_counts_the_layers(network, depth):
    nodes = op_nodes(get_symbol(network, depth=depth, data_type="cifar10"))
    convs = [n for n in nodes if n["op"] == "Convolution" and not n["name"].endswith("_sc")]
    assert len(convs) + 1 == depth
    units = {name.rsplit("_", 1)[0] for name in (n["name"] for n in convs) if name.startswith("stage")}
    assert ("stage1_unit1_conv3" in {n["name"] for n in convs}) == (depth >= 164)
    assert len(units) == (depth - 2) // (9 if depth >= 164 else 6) * 3


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("resnet", {}, "choose one of se_resnext, se_resnet"),
        ("se_resnet", {"num_group": 32}, "no option num_group; it has num_classes, data_type"),
        ("se_inception_v4", {"depth": 50}, "no option depth"),
        ("se_resnext", {"depht": 50}, "no option depht"),
        ("se_resnext", {"depth": 51}, "18, 34, 50, 101, 152, 200, 269"),
        ("se_resnext", {"depth": 170, "data_type": "cifar10"}, "multiple of 9"),
        ("se_resnext", {"depth": 21, "data_type": "demo"}, "multiple of 6"),
        ("se_resnext", {"depth": 2, "data_type": "demo"}, "depth 2 does not exist"),
        ("se_resnext", {"num_group": 3}, "1, 2, 4, 8, 16, 32, 64, 128"),
        ("se_resnext", {"num_group": 0}, "at least 1"),
        ("se_resnext", {"data_type": "mnist"}, "imagenet, vggface"),
        ("se_resnext", {"data_type": "vggface"}, "needs num_classes"),
        ("se_resnext", {"depth": 20, "data_type": "cifar10", "se_ratio": 1 / 32}, "se_ratio"),
        ("se_resnext", {"drop_out": 1.0}, "drop_out"),
        ("se_resnext", {"num_classes": 0}, "num_classes"),
        ("se_inception_v4", {"data_type": "demo"}, "at least 75"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(network, options, message):
    with pytest.raises(ValueError) as raised:
        get_symbol(network, **options)
    assert isinstance(raised.value, OptionError)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_basic_units_have_no_groups():
    assert get_symbol("se_resnext", depth=18, num_group=64).tojson() == get_symbol("se_resnext", depth=18).tojson()


@pytest.mark.parametrize("network", NETWORKS)
def test_every_option_changes_the_graph(network):
    size = 299
    other = {
        "num_classes": 7, "data_type": "vggface", "image_size": size, "drop_out": 0.3, "bn_mom": 0.8, "workspace": 99,
        "se_ratio": 0.25, "no_se": True, "depth": 34, "num_group": 64,
    }  # fmt: skip
    before = get_symbol(network, num_classes=1000).tojson()
    for name in option_names(network):
        # The networks take images of any size, and the ImageNet-like data types share a stem.
        same = name in ("image_size", "data_type")
        assert (get_symbol(network, **{"num_classes": 1000, name: other[name]}).tojson() == before) == same, name


@pytest.mark.parametrize("stages", [INCEPTION_V4, INCEPTION_RESNET_V2], ids=["v4", "resnet_v2"])
def test_channels_of_the_inception_tables(stages):
    network = "se_inception_v4" if stages is INCEPTION_V4 else "se_inception_resnet_v2"
    internals = get_symbol(network).get_internals()
    shapes = dict(zip(internals.list_outputs(), internals.infer_shape(data=(1, 3, 299, 299))[1]))
    for stage in stages:
        for name in stage.block_names:
            (norm,) = [key for key in shapes if re.fullmatch(rf"{name}_([a-z]+_)?relu1_output", key)]
            assert shapes[norm][1] == stage.channels
    # At 299 pixels the grids of the paper: 35, 17 and 8.
    assert {shapes[key][2] for key in shapes if key.endswith("_scale_output")} == {35, 17, 8}


@pytest.mark.parametrize("data_type", [name for name in DATA_TYPES if DATA_TYPES[name].stem == "cifar"])
def test_a_step_at_the_size_of_the_data_type_reaches_every_parameter(data_type):
    options = network_options("se_resnext", depth=20, data_type=data_type)
    symbol = get_symbol("se_resnext", depth=20, data_type=data_type)
    executor = symbol.simple_bind(mx.cpu(), data=(8, 3, options.image_size, options.image_size))
    random = np.random.default_rng(0)
    for name, array in executor.arg_dict.items():
        scale = 60.0 if name == "data" else np.sqrt(2 / np.prod(array.shape[1:]))
        # Positive, so that no hidden unit of an SE block, which may be the only one, is off for all images.
        array[:] = 5.0 if name.endswith("_excitation1_bias") else random.normal(size=array.shape) * scale
    executor.arg_dict["softmax_label"][:] = random.integers(10, size=8)
    executor.forward(is_train=True)
    executor.backward()
    mx.nd.waitall()
    still = {name for name, gradient in executor.grad_dict.items() if not gradient.asnumpy().any()}
    # The gamma of bn_data is fixed at 1.
    assert still == {"softmax_label", "bn_data_gamma"}


def test_rows_without_a_label_get_no_gradient():
    symbol = mx.sym.SoftmaxOutput(mx.sym.Variable("scores"), name="softmax")
    declared = next(node for node in op_nodes(get_symbol("se_resnext", depth=8, data_type="demo"))[::-1])
    symbol = mx.sym.SoftmaxOutput(mx.sym.Variable("scores"), name="softmax", **declared["attrs"])
    executor = symbol.simple_bind(mx.cpu(), scores=(3, 4))
    executor.arg_dict["scores"][:] = np.arange(12).reshape(3, 4)
    executor.arg_dict["softmax_label"][:] = [1, -1, 2]
    executor.forward(is_train=True)
    executor.backward()
    gradient = executor.grad_dict["scores"].asnumpy()
    assert gradient[[0, 2]].any(axis=1).all()
    assert not gradient[1].any()
