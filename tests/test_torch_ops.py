"""One op at a time against MXNet: outputs, gradients and moving statistics, attributes given and left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from errors import ProjectError
from graph.symbol_json import GraphError, parse
from graph.to_torch import to_torch
from mxnet_compat import mx
from tests.graph_checks import assert_same, run_torch, value

S = mx.sym
DATA = S.Variable("data")
LEFT, RIGHT = S.Variable("left"), S.Variable("right")


def data(*shape: int) -> dict[str, np.ndarray]:
    return {"data": value("some data", shape)}


def pair(left: tuple, right: tuple) -> dict[str, np.ndarray]:
    return {"left": value("some left", left), "right": np.abs(value("some right", right)) + 0.5}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 9, 8), {"kernel": (3, 3)}),
        ((2, 3, 9, 8), {"kernel": (1, 1), "no_bias": True}),
        ((2, 3, 9, 8), {"kernel": (3, 2), "stride": (2, 1), "pad": (1, 2), "dilate": (2, 1)}),
        ((2, 4, 9, 8), {"kernel": (3, 3), "pad": (1, 1), "num_group": 2}),
        ((2, 6, 7, 7), {"kernel": (3, 3), "num_group": 6, "layout": "NCHW", "cudnn_tune": "off"}),
        ((2, 3, 11), {"kernel": (4,), "stride": (2,)}),
        ((2, 3, 5, 6, 7), {"kernel": (2, 3, 3), "pad": (0, 1, 1)}),
    ],
)
def test_convolution(shape, options):
    assert_same(S.Convolution(DATA, num_filter=6, name="conv", **options), data(*shape))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (3, 3)},
        {"kernel": (4, 4), "stride": (2, 2), "pad": (1, 1), "no_bias": False},
        {"kernel": (3, 3), "stride": (3, 2), "adj": (2, 1), "num_group": 2},
        {"kernel": (3, 3), "dilate": (2, 1), "pad": (1, 0)},
        {"kernel": (3, 3), "stride": (2, 2), "target_shape": (11, 13)},
        {"kernel": (4, 4), "stride": (2, 2), "target_shape": (12, 14)},
    ],
)
def test_deconvolution(options):
    assert_same(S.Deconvolution(DATA, num_filter=4, name="up", **options), data(2, 6, 5, 6))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 5), {}),
        ((3, 5, 2, 2), {}),
        ((3, 5, 4), {"flatten": False}),
        ((3, 5), {"no_bias": True}),
    ],
)
def test_fully_connected(shape, options):
    assert_same(S.FullyConnected(DATA, num_hidden=7, name="fc", **options), data(*shape))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fix_gamma": False},
        {"fix_gamma": False, "eps": 2e-5, "momentum": 0.5},
        {"fix_gamma": False, "use_global_stats": True},
        {"fix_gamma": False, "axis": 2},
        {"fix_gamma": False, "axis": -1},
    ],
)
def test_batch_norm(options, train):
    assert_same(
        S.BatchNorm(DATA, name="bn", **options), data(3, 4, 5, 6), train=train, backward=train, gradient_tolerance=2e-5
    )


def test_batch_norm_on_vectors_and_on_one_value_a_channel():
    symbol = S.BatchNorm(DATA, name="bn", fix_gamma=False)
    assert_same(symbol, data(6, 5), gradient_tolerance=2e-5)
    assert_same(symbol, data(1, 5, 1, 1), tolerance=1e-4)  # 1 / sqrt(eps) magnifies the last bits


POOLINGS = [
    {"kernel": (2, 2)},
    {"kernel": (3, 3), "stride": (2, 2)},
    {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1)},
    {"kernel": (2, 2), "stride": (2, 2), "pad": (1, 1)},
    {"kernel": (3, 2), "stride": (3, 1), "pad": (1, 0)},
    {"kernel": (5, 5), "stride": (3, 2), "pad": (2, 2)},
]


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 3, 9, 5), (1, 2, 10, 11)])
@pytest.mark.parametrize("options", POOLINGS)
@pytest.mark.parametrize(
    "kind",
    [{}, {"pool_type": "avg"}, {"pool_type": "avg", "count_include_pad": False}, {"pool_type": "sum"}],
    ids=lambda kind: "-".join(map(str, kind.values())) or "max",
)
@pytest.mark.parametrize("convention", ["valid", "full"])
def test_pooling(shape, options, kind, convention):
    # MXNet's gradient is wrong in some cases of "full" with counted padding, so there only outputs compare.
    averaged = kind.get("pool_type") in ("avg", "sum") and kind.get("count_include_pad", True)
    trusted = not (convention == "full" and averaged)
    if convention == "full" and not kind.get("count_include_pad", True) and options["kernel"] == (2, 2):
        pytest.skip("MXNet cannot run windows that hold padding alone")
    chosen = {} if convention == "valid" else {"pooling_convention": "full"}
    assert_same(S.Pooling(DATA, name="pool", **options, **kind, **chosen), data(*shape), backward=trusted)


@pytest.mark.parametrize("kind", ["max", "avg", "sum"])
def test_global_pooling_ignores_the_window(kind):
    inputs = data(2, 3, 5, 4)
    assert_same(S.Pooling(DATA, global_pool=True, pool_type=kind, name="p"), inputs)
    window = {"kernel": (2, 2), "stride": (2, 2), "pad": (1, 1)}
    assert_same(S.Pooling(DATA, global_pool=True, pool_type=kind, name="p", **window), inputs)


def test_max_pooling_ties_go_to_the_first():
    assert_same(S.Pooling(DATA, kernel=(3, 3), stride=(2, 2), name="p"), {"data": np.ones((1, 1, 7, 7), np.float32)})


def test_pooling_in_one_and_three_dimensions():
    assert_same(S.Pooling(DATA, kernel=(3,), stride=(2,), pool_type="avg", name="p"), data(2, 3, 9))
    assert_same(S.Pooling(DATA, kernel=(2, 3, 2), stride=(2, 2, 2), name="p"), data(2, 3, 4, 7, 6))


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "tanh", "softrelu", "softsign"])
def test_activation(kind):
    assert_same(S.Activation(DATA, act_type=kind), data(3, 4, 2, 2))


def test_relu_has_no_gradient_at_zero():
    assert_same(S.Activation(DATA, act_type="relu"), {"data": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize(
    "options",
    [{}, {"slope": 0.1}, {"act_type": "elu"}, {"act_type": "elu", "slope": 1.0}, {"act_type": "gelu"}],
)
def test_leaky_relu(options):
    assert_same(S.LeakyReLU(DATA, **options), data(3, 4, 2, 2), gradient_tolerance=2e-5)


def test_prelu():
    assert_same(S.LeakyReLU(DATA, act_type="prelu", name="act"), data(3, 4, 2, 2))


@pytest.mark.parametrize("kind", ["selu", "rrelu"])
def test_activations_that_mxnet_cannot_train_run_in_inference_only(kind):
    symbol = S.LeakyReLU(DATA, act_type=kind, name="act")[0]
    assert_same(symbol, data(3, 4), train=False, backward=False)
    with pytest.raises(ProjectError, match="'act'.*refused"):
        run_torch(symbol, data(3, 4), train=True)


@pytest.mark.parametrize(
    "name",
    ["relu", "sigmoid", "tanh", "softsign", "exp", "square", "abs", "negative", "erf"],
)
def test_unary(name):
    assert_same(getattr(S, name)(DATA), data(3, 4))


@pytest.mark.parametrize("name", ["log", "sqrt", "rsqrt", "reciprocal"])
def test_unary_of_positive_numbers(name):
    assert_same(getattr(S, name)(DATA), {"data": np.abs(value("x", (3, 4))) + 0.1})


@pytest.mark.parametrize("name", ["ones_like", "zeros_like"])
def test_constants(name):
    assert_same(getattr(S, name)(DATA) * DATA, data(3, 4))


def test_clip_passes_gradients_at_its_bounds():
    assert_same(S.clip(DATA, a_min=-1, a_max=1), {"data": np.array([[-2, -1, 0, 1, 2]], np.float32)})


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("options", [{}, {"axis": 1}, {"axis": 1, "temperature": 2.0}])
def test_softmax(name, options):
    assert_same(getattr(S, name)(DATA, **options), data(3, 4, 5))


def test_softmax_activation():
    assert_same(S.SoftmaxActivation(DATA), data(3, 4))
    assert_same(S.SoftmaxActivation(DATA), data(3, 4, 2, 2), backward=False)  # MXNet's gradient is broken here
    assert_same(S.SoftmaxActivation(DATA, mode="channel"), data(3, 4, 2, 2))


@pytest.mark.parametrize("options", [{"nsize": 5}, {"nsize": 3, "alpha": 0.1, "beta": 0.5, "knorm": 1.0}])
def test_local_response_norm(options):
    assert_same(S.LRN(DATA, **options), data(2, 7, 3, 4))


BINARY = ["elemwise_add", "elemwise_sub", "elemwise_mul", "elemwise_div", "maximum", "minimum"]


@pytest.mark.parametrize("name", BINARY)
def test_elementwise(name):
    assert_same(getattr(S, name)(LEFT, RIGHT), pair((3, 4), (3, 4)))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum"])
def test_broadcast(name):
    function = getattr(S, f"broadcast_{name}")
    assert_same(function(LEFT, RIGHT), pair((3, 4, 2, 5), (3, 4, 1, 1)))
    assert_same(function(LEFT, RIGHT), pair((1, 4, 1, 5), (3, 1, 2, 5)))


@pytest.mark.parametrize(
    "expression",
    [
        lambda x: x + 2,
        lambda x: x - 2,
        lambda x: 2 - x,
        lambda x: x * 3,
        lambda x: x / 3,
        lambda x: 3 / x,
        lambda x: x**3,
        lambda x: S.maximum(x, 1),
        lambda x: S.minimum(x, 1),
    ],
)
def test_scalars(expression):
    assert_same(expression(DATA), {"data": np.abs(value("x", (3, 4))) + 0.2})


def test_add_n():
    assert_same(S.add_n(LEFT, RIGHT, LEFT), pair((3, 4), (3, 4)))


@pytest.mark.parametrize("name", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1},
        {"axis": -1},
        {"axis": (2, 3)},
        {"axis": (2, 3), "keepdims": True},
        {"axis": (0, 1), "exclude": True},
        {"axis": ()},
    ],
)
def test_reductions(name, options):
    assert_same(getattr(S, name)(DATA, **options), data(2, 3, 4, 5))


@pytest.mark.parametrize("a", [False, True])
@pytest.mark.parametrize("b", [False, True])
def test_dot_and_batch_dot(a, b):
    left, right = ((4, 3) if a else (3, 4)), ((5, 4) if b else (4, 5))
    flags = {"transpose_a": a, "transpose_b": b}
    assert_same(S.dot(LEFT, RIGHT, **flags), pair(left, right))
    assert_same(S.batch_dot(LEFT, RIGHT, **flags), pair((2, *left), (2, *right)))


def test_dot_of_higher_rank():
    assert_same(S.dot(LEFT, RIGHT), pair((2, 3, 4), (4, 5, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (0, -1)},
        {"shape": (-1, 12, 1, 1)},
        {"shape": (0, 0, 0, 0)},
        {"shape": (0, 0, -1)},
        {"shape": (0, -3, -2)},
        {"shape": (-3, -3)},
        {"shape": (-2,)},
        {"shape": (0, -4, 3, -1, -2)},
        {"shape": (0, -4, -1, 4, 0, 0)},
        {"shape": (-1, 0), "reverse": True},
        {"shape": (0, -4, 3, 4, -2)},
        {"shape": (-1, 6, 0), "reverse": True},
        {"shape": (0, 0, 2, -1, -4, 0), "reverse": True},
        {"shape": (2, 12, 10, 3)},
    ],
)
def test_reshape_codes(options):
    assert_same(S.reshape(DATA, **options), data(2, 12, 6, 5))


def test_reshape_with_the_legacy_target_shape():
    symbol = S.reshape(DATA, shape=(0, -1), name="r")
    for attributes in ({"target_shape": "(2, 0)"}, {"target_shape": "(0, 0)", "keep_highest": "True"}):
        content = json.loads(symbol.tojson())
        content["nodes"][1]["attrs"] = attributes
        assert_same(mx.sym.load_json(json.dumps(content)), data(2, 3, 4))


@pytest.mark.parametrize(
    "symbol",
    [
        S.Flatten(DATA),
        S.expand_dims(DATA, axis=1),
        S.expand_dims(DATA, axis=-1),
        S.transpose(DATA),
        S.transpose(DATA, axes=(0, 2, 3, 1)),
        S.SwapAxis(DATA),
        S.SwapAxis(DATA, dim1=1, dim2=3),
        S.slice(DATA, begin=(0, 1), end=(None, 3)),
        S.slice(DATA, begin=(None, -2, 0, 1), end=(2, None, 4, -1), step=(1, 1, 2, 1)),
        S.slice_axis(DATA, axis=1, begin=1, end=3),
        S.slice_axis(DATA, axis=-1, begin=-3, end=None),
        S.SliceChannel(DATA, num_outputs=2),
        S.SliceChannel(DATA, num_outputs=5, axis=3, squeeze_axis=True),
        S.squeeze(S.mean(DATA, axis=(2, 3), keepdims=True)),
        S.squeeze(S.mean(DATA, axis=(2, 3), keepdims=True), axis=3),
        S.broadcast_axis(S.mean(DATA, axis=1, keepdims=True), axis=1, size=3),
        S.broadcast_to(S.mean(DATA, axis=1, keepdims=True), shape=(0, 3, 0, 0)),
        S.broadcast_like(S.mean(DATA, axis=1, keepdims=True), DATA),
        S.reshape_like(S.transpose(DATA), DATA),
        S.slice_like(DATA, S.slice_axis(DATA, axis=2, begin=0, end=3)),
        S.slice_like(DATA, S.slice(DATA, begin=(0, 0), end=(1, 2)), axes=(1,)),
        S.Concat(DATA, DATA * 2),
        S.Concat(DATA, DATA * 2, dim=3),
        S.stack(DATA, DATA * 2),
        S.stack(DATA, DATA * 2, axis=2),
        S.identity(DATA),
        S.Cast(DATA, dtype="float32"),
        S.Pad(DATA, mode="constant", pad_width=(0, 0, 0, 0, 1, 2, 3, 0), constant_value=0.5),
        S.Pad(DATA, mode="edge", pad_width=(0, 0, 0, 0, 1, 2, 3, 0)),
        S.Pad(DATA, mode="reflect", pad_width=(0, 0, 0, 0, 1, 2, 3, 0)),
        S.UpSampling(DATA, scale=2, sample_type="nearest"),
        S.contrib.AdaptiveAvgPooling2D(DATA, output_size=1),
        S.contrib.AdaptiveAvgPooling2D(DATA, output_size=(3, 2)),
        S.contrib.AdaptiveAvgPooling2D(DATA),
        S.contrib.BilinearResize2D(DATA, height=7, width=9),
        S.contrib.BilinearResize2D(DATA, height=7, width=3, align_corners=False),
    ],
    ids=lambda symbol: symbol.name,
)
def test_shapes(symbol):
    assert_same(symbol, data(3, 4, 6, 5))


def test_block_grad():
    assert_same(S.BlockGrad(DATA * 2) + DATA, data(3, 4))


@pytest.mark.parametrize(
    "options",
    [{}, {"grad_scale": 0.5}, {"normalization": "batch"}, {"normalization": "valid", "valid_thresh": 0.2}],
)
def test_make_loss(options):
    assert_same(S.MakeLoss(DATA * 3, **options), data(4, 5))


MODES = [
    {},
    {"grad_scale": 0.5},
    {"normalization": "batch"},
    {"normalization": "valid"},
    {"use_ignore": True, "ignore_label": -1},
    {"use_ignore": True, "ignore_label": 2, "normalization": "valid"},
    {"use_ignore": True, "ignore_label": 2, "normalization": "batch"},
    {"smooth_alpha": 0.1},
    {"smooth_alpha": 0.1, "use_ignore": True, "ignore_label": 2},
]


def softmax_inputs(shape: tuple, labels: tuple) -> dict[str, np.ndarray]:
    numbers = np.random.RandomState(3).randint(0, 4, labels).astype(np.float32)
    numbers.flat[1] = -1
    return {**data(*shape), "softmax_label": numbers}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("layout", "shape", "labels"),
    [
        ({}, (6, 4), (6,)),
        ({"preserve_shape": True}, (3, 5, 4), (3, 5)),
        ({"multi_output": True}, (3, 4, 5), (3, 5)),
        ({"multi_output": True}, (3, 4, 5, 2), (3, 5, 2)),
    ],
)
def test_softmax_output(layout, shape, labels, mode):
    assert_same(S.SoftmaxOutput(DATA, name="softmax", **layout, **mode), softmax_inputs(shape, labels))


def test_softmax_output_with_probabilities_as_labels():
    inputs = data(3, 4)
    inputs["softmax_label"] = np.full((3, 4), 0.25, np.float32)
    assert_same(S.SoftmaxOutput(DATA, name="softmax", grad_scale=2.0), inputs)


def test_dropout_keeps_the_expected_share_and_passes_in_inference():
    symbol = S.Dropout(DATA, p=0.3)
    inputs = {"data": np.ones((200, 200), np.float32)}
    assert_same(symbol, inputs, train=False)
    kept = run_torch(symbol, inputs, train=True).outputs[0]
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.7)}
    assert (kept > 0).mean() == pytest.approx(0.7, abs=0.02)
    always = run_torch(S.Dropout(DATA, p=0.3, mode="always"), inputs, train=False).outputs[0]
    assert (always > 0).mean() == pytest.approx(0.7, abs=0.02)
    assert (run_torch(S.Dropout(DATA), inputs, train=True).outputs[0] > 0).mean() == pytest.approx(0.5, abs=0.02)


REFUSED = [
    (S.LeakyReLU(DATA, act_type="prelu", name="x"), {"act_type": "swish"}, "act_type=swish is not supported"),
    (S.Pooling(DATA, kernel=(2, 2), name="x"), {"pool_type": "lp"}, "pool_type=lp is not supported"),
    (S.Convolution(DATA, kernel=(1, 1), num_filter=2, name="x"), {"layout": "NHWC"}, "layout=NHWC"),
    (S.BatchNorm(DATA, name="x"), {"output_mean_var": "True"}, "output_mean_var"),
    (S.Flatten(DATA, name="x"), {"novelty": "3"}, "attribute novelty is not supported"),
    (S.Activation(DATA, act_type="relu", name="x"), {"act_type": "log_sigmoid"}, "act_type=log_sigmoid"),
    (S.FullyConnected(DATA, num_hidden=2, name="x"), {"num_hidden": "two"}, "expected an integer"),
    (S.FullyConnected(DATA, num_hidden=2, name="x"), {"no_bias": "True"}, "no_bias contradicts"),
    (S.clip(DATA, a_min=0, a_max=6, name="x"), {"a_min": None}, "'a_min' is missing"),
    (S.reshape(DATA, shape=(0, -1), name="x"), {"shape": "(0, -3, -3, -3)"}, "does not fit data"),
    (S.SliceChannel(DATA, num_outputs=2, name="x"), {"num_outputs": "3"}, "equal parts"),
    (S.slice(DATA, begin=(0,), end=(2,), name="x"), {"step": "(-1,)"}, "positive steps"),
    (S.SoftmaxOutput(DATA, name="x"), {"out_grad": "True"}, "out_grad=True"),
    (S.SoftmaxOutput(DATA, name="x"), {}, "needs multi_output"),
    (S.Pad(DATA, mode="edge", pad_width=(0,) * 8, name="x"), {"pad_width": "(0,0,1,0,0,0,0,0)"}, "first two axes"),
    (S.elemwise_add(DATA, S.mean(DATA, axis=1, keepdims=True), name="x"), {}, "differ"),
    (S.transpose(DATA, axes=(0, 1, 2, 3), name="x"), {"axes": "(0, 1)"}, "does not fit inputs"),
]


@pytest.mark.parametrize(("symbol", "change", "message"), REFUSED)
def test_unsupported_attributes_are_refused_with_the_node(symbol, change, message):
    content = json.loads(symbol.tojson())
    attributes = content["nodes"][-1].setdefault("attrs", {})
    attributes.update(change)
    content["nodes"][-1]["attrs"] = {key: text for key, text in attributes.items() if text is not None}
    with pytest.raises(GraphError, match=f"'x'.*{message}"):
        to_torch(parse(json.dumps(content)), {"data": (2, 4, 6, 6)})


def test_unsupported_ops_are_listed_before_anything_runs():
    symbol = S.sort(S.gamma(DATA, name="first"), name="second")
    with pytest.raises(GraphError, match=r"gamma \(node 'first'\), sort \(node 'second'\)"):
        to_torch(parse(symbol.tojson()), {"data": (2, 3)})
