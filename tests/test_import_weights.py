"""Published weights in our graphs: the same logits where the networks agree, a named difference where they do not."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from reference_resnet import se_resnext50

from errors import UsageError, run_command
from graph import import_weights as command
from graph.import_weights import import_weights
from graph.params_file import read_arrays
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from graph.weight_files import read_weights
from graph.weight_layouts import LAYOUTS
from symbols import get_symbol_json

CLASSES = 7
SIZE = 64
GLUONCV, CADENE, TIMM = LAYOUTS


def random_arrays(shapes: dict) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1, and moving statistics that are not the initial ones."""
    rng = np.random.default_rng(5)
    arrays = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            arrays[name] = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("var"):
            # In the stem (64 channels), some are so small that eps counts.
            arrays[name] = rng.uniform(0.5, 1.5, shape) * (rng.choice([1, 1e-4], shape) if shape == (64,) else 1)
        elif name.endswith(("gamma", "weight")):
            arrays[name] = rng.uniform(0.5, 1, shape)
        else:
            arrays[name] = rng.normal(size=shape) * 0.1
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def graph_of(**options):
    return parse(get_symbol_json(**{"network": "se_resnext", "num_classes": CLASSES, "image_size": SIZE, **options}))


def source_in(layout, **options) -> dict[str, np.ndarray]:
    """Weights in `layout` that fit the graph with these options."""
    shapes = parameter_shapes(graph_of(**options), {"data": (1, 3, SIZE, SIZE), "softmax_label": (1,)})
    named = {}
    for target, shape in shapes.items():
        name = layout.source_name(target.split(":", 1)[1])
        if name:
            named[name] = (*shape, 1, 1) if "excitation1_weight" in target or "excitation2_weight" in target else shape
    return {name: np.zeros(shape, np.float32) for name, shape in named.items()}


@pytest.fixture(scope="module")
def torch_weights() -> dict[str, torch.Tensor]:
    """A state_dict of the reference network."""
    network = se_resnext50()
    state = network.state_dict()
    arrays = random_arrays({name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()})
    return {name: torch.from_numpy(arrays[name]) if name in arrays else t for name, t in state.items()}


@pytest.fixture
def symbol_json(tmp_path):
    path = tmp_path / "ours-symbol.json"
    path.write_text(get_symbol_json("se_resnext", depth=50, num_classes=CLASSES))
    return path


def run(*argv: object) -> int:
    return run_command(lambda: command.main([*map(str, argv), "--image-size", str(SIZE)]))


def test_torch_weights_give_the_logits_of_their_network(torch_weights, symbol_json, tmp_path, capsys):
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in torch_weights.items()}}, tmp_path / "their.pth")
    out = tmp_path / "new" / "imported"
    status = run(
        tmp_path / "their.pth", "--graph", symbol_json, "-o", out, "--compare", "reference_resnet:se_resnext50",
        "--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.25",
    )  # fmt: skip
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layout: timm's ResNet"
    assert "used       arg:stage1_unit1_conv2_weight <- layer1.0.conv2.weight (128, 4, 3, 3)" in lines
    assert "made       aux:bn_data_moving_var" in lines
    assert "unused     layer4.2.bn3.num_batches_tracked" in lines
    parameters = sum(name.endswith("num_batches_tracked") for name in torch_weights)
    assert f"{len(torch_weights) - parameters} used, 4 made, {parameters} unused, 0 missing, 0 misshaped" in lines
    deviation = float(lines[-3].rpartition(": ")[2].split()[0])
    assert deviation < 1e-4
    assert (tmp_path / "new" / "imported-symbol.json").read_bytes() == symbol_json.read_bytes()
    assert all(array.dtype == np.float32 for array in read_arrays(f"{out}-0000.params").values())


def test_wrong_normalisation_shows_in_the_comparison(torch_weights):
    from graph.compare_weights import compare_with_torch

    graph = graph_of(depth=50)
    source = {name: tensor.numpy() for name, tensor in torch_weights.items()}
    _, _, params = import_weights(graph, source, SIZE, mean=(0.4, 0.5, 0.6))
    maker = "reference_resnet:se_resnext50"
    assert compare_with_torch(maker, source, graph, params, SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) > 1e-2


def test_gluoncv_weights_give_the_logits_of_their_network(symbol_json, tmp_path, capsys):
    from gluon import zoo
    from gluon.__main__ import main as gluon_main
    from mxnet_compat import mx

    network = zoo.gluoncv_network("se_resnext50_32x4d", CLASSES).network
    network.initialize()
    network(mx.nd.zeros((1, 3, SIZE, SIZE)))
    parameters = network.collect_params()
    for name, array in random_arrays({name: parameter.shape for name, parameter in parameters.items()}).items():
        parameters[name].set_data(mx.nd.array(array))
    network.save_parameters(str(tmp_path / "their.params"))

    assert run(tmp_path / "their.params", "--graph", symbol_json, "-o", tmp_path / "ours") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layout: GluonCV's SE-ResNeXt"
    assert lines[-3].endswith("used, 4 made, 0 unused, 0 missing, 0 misshaped")
    compare = [
        "compare", "se_resnext", "--num-classes", CLASSES, "--image-size", SIZE, "--params", tmp_path / "ours", 0,
        "--with", "gluoncv:se_resnext50_32x4d", "--weights",
    ]  # fmt: skip
    argv = [str(argument) for argument in compare]
    assert run_command(lambda: gluon_main([*argv, str(tmp_path / "their.params")])) == 0
    deviation = float(capsys.readouterr().out.rpartition(": ")[2].split()[0])
    assert deviation < 1e-4
    assert run_command(lambda: gluon_main([*argv, str(tmp_path / "ours-0000.params")])) == 2
    assert "not the weights of GluonCV's network" in capsys.readouterr().err


@pytest.mark.parametrize("layout", [GLUONCV, TIMM], ids=["gluoncv", "timm"])
@pytest.mark.parametrize("options", [{"depth": 101}, {"depth": 50, "no_se": True}, {"depth": 50, "num_group": 64}])
def test_every_tensor_of_a_fitting_network_is_used(layout, options):
    report, found, params = import_weights(graph_of(**options), source_in(layout, **options), SIZE)
    assert found == []
    assert report.layout is layout
    assert not report.unused + report.missing + report.misshaped
    assert len(params) == len(report.used) + len(report.made)


def refused(graph, source, size: int = SIZE) -> str:
    _, found, params = import_weights(graph, source, size)
    assert params is None
    return "; ".join(found)


def test_networks_that_differ_are_refused():
    source = source_in(TIMM, depth=50)
    assert "pre-activation" in refused(graph_of(network="se_resnet", depth=50), source)
    assert "not a residual network" in refused(graph_of(network="se_inception_v4", image_size=224), source, 224)
    assert "no bn0" in refused(graph_of(depth=56, data_type="cifar10"), source)

    text = refused(graph_of(depth=50), source_in(CADENE, depth=50))
    assert "3 x 3 stride 2, no padding, ceil mode in the source, 3 x 3 stride 2, padding 1 in the graph" in text
    # Without groups it is Cadene's SE-ResNet.
    text = refused(graph_of(depth=50, num_group=1), source_in(CADENE, depth=50, num_group=1))
    assert "strides in the first 1 x 1 convolution" in text

    rounded = source_in(TIMM, depth=18)
    rounded["layer1.0.se.fc1.weight"] = np.zeros((8, 64, 1, 1), np.float32)
    assert "hidden width of the SE blocks: 8 in the source (layer1.0.se.fc1.weight), 4 in the graph" in refused(
        graph_of(depth=18), rounded
    )
    assert "the graph has no place for layer3.6.conv1.weight" in refused(graph_of(depth=50), source_in(TIMM, depth=101))
    assert "the source has no layer3.6.conv1.weight" in refused(graph_of(depth=101), source)
    assert "layer1.0.conv2.weight is (128, 2, 3, 3), arg:stage1_unit1_conv2_weight needs (128, 4, 3, 3)" in refused(
        graph_of(depth=50), source_in(TIMM, depth=50, num_group=64)
    )
    assert "fc.weight is (9, 2048)" in refused(graph_of(depth=50), source_in(TIMM, depth=50, num_classes=9))


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        (TIMM, "conv1.0.weight", "three 3 x 3 convolutions"),
        (GLUONCV, "features.6.weight", "three 3 x 3 convolutions"),
        (TIMM, "layer2.0.downsample.2.running_mean", "average before they project"),
        (GLUONCV, "features.5.0.downsample.2.running_mean", "average before they project"),
    ],
)
def test_variants_are_refused(layout, name, message):
    source = {**source_in(layout, depth=50), name: np.zeros(1, np.float32)}
    assert message in refused(graph_of(depth=50), source)


def test_refusal_is_one_line_after_the_report(symbol_json, tmp_path, capsys, torch_weights):
    source = {name: tensor for name, tensor in torch_weights.items() if not name.startswith("layer4.2")}
    torch.save(source, tmp_path / "part.pth")
    assert run(tmp_path / "part.pth", "--graph", symbol_json, "-o", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "missing    arg:stage4_unit3_conv1_weight (no layer4.2.conv1.weight)" in captured.out
    assert captured.err.startswith(
        f"error: {tmp_path / 'part.pth'} does not fit {symbol_json}: the source has no layer4.2"
    )
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def write_safetensors(path, arrays: dict) -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, shape, data) in arrays.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_safetensors(tmp_path):
    values = np.array([[1.5, -2.0]], np.float32)
    path = tmp_path / "w.safetensors"
    bfloat16 = (values.view(np.uint32) >> 16).astype("<u2")
    write_safetensors(
        path,
        {
            "a": ("F32", [1, 2], values.tobytes()),
            "b": ("BF16", [1, 2], bfloat16.tobytes()),
            "n": ("I64", [], np.int64(3).tobytes()),
        },
    )
    arrays = read_weights(path)
    np.testing.assert_array_equal(arrays["a"], values)
    np.testing.assert_array_equal(arrays["b"], values)
    assert arrays["b"].dtype == np.float32
    assert arrays["n"] == 3


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_that_are_no_weights(tmp_path, capsys):
    torch.save({"a": Harmful()}, tmp_path / "harmful.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x01")
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    write_safetensors(tmp_path / "outside.safetensors", {"a": ("F32", [4], b"1234")})
    write_safetensors(tmp_path / "kind.safetensors", {"a": ("X9", [4], b"1234")})
    (tmp_path / "damaged.params").write_bytes(b"nothing")
    (tmp_path / "weights.h5").write_bytes(b"nothing")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UsageError, match=path.name):
            read_weights(path)
    with pytest.raises(UsageError, match="no such file"):
        read_weights(tmp_path / "missing.pth")
    assert "must not run" not in capsys.readouterr().out


def test_unknown_layout_and_maker(symbol_json, tmp_path, torch_weights, capsys):
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert run(tmp_path / "other.pth", "--graph", symbol_json, "-o", tmp_path / "out") == 2
    assert "no known layout (GluonCV's SE-ResNeXt, Cadene's SENet, timm's ResNet)" in capsys.readouterr().err
    torch.save(torch_weights, tmp_path / "their.pth")
    arguments = [tmp_path / "their.pth", "--graph", symbol_json, "-o", tmp_path / "out", "--compare"]
    assert run(*arguments, "no_such_module:f") == 2
    assert "--compare no_such_module:f" in capsys.readouterr().err
    assert run(*arguments, "torch.nn:Identity") == 2
    assert "does not take the weights" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
