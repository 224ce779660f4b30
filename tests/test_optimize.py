"""Networks made faster for inference give the same logits: folded BatchNorms, fused sums, packed convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graph.optimize import PackedConvolution, can_prepack, optimize_for_inference
from graph.symbol_json import parse
from graph.to_torch import load_params, named_tensors, read_params, to_torch
from graph.torch_ops import BatchNorm
from graph.trained import without_loss
from mxnet_compat import mx
from symbols import get_symbol_json
from tests.graph_checks import translated, zoo_symbol
from tests.test_symbols import GOLDEN_NETWORKS, golden_value

S = mx.sym
# Images small enough for a fast test and large enough for the network.
SIZES = {"se_inception_v4": 139, "se_inception_resnet_v2": 139, "se_resnext_cifar_20": 32}
# BatchNorms that nothing can take up: that of the pixels, before a padded convolution; those of sums and joined
# branches, before a ReLU.
REMAINING = {"se_resnet_50": 18, "se_inception_v4": 17, "se_inception_resnet_v2": 23}
TOLERANCE = 1e-4


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def batch_norms(module) -> int:
    return sum(isinstance(part, BatchNorm) for part in module.modules())


def golden_module(name: str):
    """The network with its golden values up to the logits, and two images."""
    network, options = GOLDEN_NETWORKS[name]
    size = SIZES.get(name, 64)
    graph = without_loss(parse(get_symbol_json(network, **options)))
    module = to_torch(graph, {"data": (2, 3, size, size)}).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    params = {name: golden_value(name[4:], shape) for name, shape in shapes.items()}
    for key, array in params.items():
        if "excitation" in key and key.endswith("_weight"):
            array /= 100  # the golden values drive gates into saturation, where rounding decides
    load_params(module, params)
    return module, torch.from_numpy(np.random.RandomState(0).uniform(0, 255, (2, 3, size, size)).astype(np.float32))


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_golden_networks_keep_their_logits(name):
    module, data = golden_module(name)
    with torch.inference_mode():
        expected = module(data)
        for prepack in (False, True):
            fast = optimize_for_inference(module, prepack=prepack)
            assert relative(fast(data), expected) <= TOLERANCE
            assert batch_norms(fast) == REMAINING.get(name, 1)
        assert relative(fast(data[:1]), module(data[:1])) <= TOLERANCE


def test_the_original_is_not_changed():
    module, data = golden_module("se_resnext_cifar_20")
    before, code = read_params(module), module.code
    with torch.inference_mode():
        expected = module(data)
        optimize_for_inference(module)
        assert torch.equal(module(data), expected)
    after = read_params(module)
    assert module.code == code
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_packed_weights_serve_single_images_and_batches_of_any_layout():
    module, data = golden_module("se_resnext_cifar_20")
    fast = optimize_for_inference(module)
    assert can_prepack(module)
    assert any(isinstance(part, PackedConvolution) for part in fast.modules())
    data = torch.cat([data, 255 - data])
    with torch.inference_mode():
        expected = module(data)
        for rows in (slice(0, 1), slice(0, 4), slice(1, 2), slice(1, 4)):
            for layout in (torch.contiguous_format, torch.channels_last):
                kept = data[rows].clone(memory_format=layout)
                assert relative(fast(kept), expected[rows]) <= TOLERANCE
                assert torch.equal(kept, data[rows])


def check(symbol, data: np.ndarray, norms: int) -> None:
    """Both kinds of fast modules compute what the symbol computes; `norms` BatchNorms remain."""
    module = translated(symbol, {"data": data}).eval()
    for prepack in (False, True):
        fast = optimize_for_inference(module, prepack=prepack)
        assert batch_norms(fast) == norms
        with torch.inference_mode():
            assert relative(fast(torch.from_numpy(data)), module(torch.from_numpy(data))) <= 1e-5


def pixels(*shape: int) -> np.ndarray:
    return np.random.RandomState(3).normal(size=shape).astype(np.float32)


def conv(data, name: str, **options):
    return S.Convolution(data, name=name, **{"kernel": (3, 3), "num_filter": 8, **options})


def norm(data, name: str, **options):
    return S.BatchNorm(data, name=name, **{"fix_gamma": False, **options})


def test_a_batch_norm_before_a_convolution_is_folded_only_where_exact():
    data = S.Variable("data")
    for options in ({}, {"no_bias": True}, {"num_group": 2}, {"stride": (2, 2)}):
        check(conv(norm(data, "bn"), "conv", **options), pixels(2, 6, 9, 9), norms=0)
    check(conv(norm(data, "bn"), "conv", pad=(1, 1)), pixels(2, 6, 9, 9), norms=1)
    shared = norm(data, "bn")
    both = S.Concat(conv(shared, "a"), conv(shared, "b", num_group=2))
    check(both, pixels(2, 6, 9, 9), norms=0)
    check(S.Concat(conv(shared, "a", kernel=(1, 1)), shared), pixels(2, 6, 9, 9), norms=1)


def test_a_batch_norm_after_a_layer_is_folded_unless_others_read_the_layer():
    data = S.Variable("data")
    check(norm(conv(data, "conv"), "bn", fix_gamma=True), pixels(2, 6, 9, 9), norms=0)
    check(norm(conv(data, "conv", no_bias=True, num_group=2), "bn", eps=0.5), pixels(2, 6, 9, 9), norms=0)
    check(norm(S.FullyConnected(data, num_hidden=5, name="fc"), "bn"), pixels(4, 6), norms=0)
    inner = conv(data, "conv")
    check(norm(inner, "bn") + inner, pixels(2, 6, 9, 9), norms=1)
    weight = S.Variable("shared_weight")
    twice = [norm(conv(data, f"conv{i}", weight=weight), f"bn{i}") for i in range(2)]
    check(S.Concat(*twice), pixels(2, 6, 9, 9), norms=0)


def test_sums_overwrite_only_what_nobody_reads_again():
    data = S.Variable("data")
    left, right = conv(data, "left"), conv(data, "right")
    scale = S.sigmoid(S.mean(left, axis=(2, 3), keepdims=True))
    scaled = S.broadcast_mul(left, scale)
    for symbol in (
        S.relu(scaled + right),
        S.relu(right + scaled),
        S.Concat(S.relu(scaled + right), right),
        S.relu(left + right) + left,
        S.relu(left + left),
        left + right + left,
        scaled + scaled,
        S.relu(conv(S.relu(left), "after", pad=(1, 1)) + S.relu(left)),
        conv(data, "same", num_filter=6, pad=(1, 1)) + data,
        S.broadcast_mul(data, S.mean(data, axis=(2, 3), keepdims=True)) + data,
    ):
        inputs = pixels(2, 6, 9, 9)
        kept = inputs.copy()
        check(symbol, inputs, norms=0)
        assert np.array_equal(inputs, kept)


def test_dropout_goes_and_dropout_that_always_drops_stays():
    data = S.Variable("data")
    check(S.Dropout(conv(data, "conv"), p=0.5), pixels(2, 6, 9, 9), norms=0)
    module = translated(S.Dropout(data, p=0.5, mode="always", name="drop"), {"data": pixels(2, 6)}).eval()
    assert "drop" in optimize_for_inference(module).code


def test_public_operators_alone_run_under_autocast():
    module, data = golden_module("se_resnext_cifar_20")
    fast = optimize_for_inference(module, prepack=False)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(fast(data).float(), module(data).float()) <= 0.05


@pytest.mark.parametrize("name", ["mobilenet0.25", "resnet18_v2", "shufflenet_v2"])
def test_networks_of_the_zoo(name):
    data = np.random.RandomState(0).normal(size=(2, 3, 96, 96)).astype(np.float32)
    module = translated(zoo_symbol(name), {"data": data}).eval()
    fast = optimize_for_inference(module)
    with torch.inference_mode():
        assert relative(fast(torch.from_numpy(data)), module(torch.from_numpy(data))) <= TOLERANCE
