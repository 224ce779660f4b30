"""`python -m gluon export` writes files that MXNet's own loaders run, with the same logits as the network."""

from __future__ import annotations

import numpy as np
import pytest

from errors import run_command
from gluon.__main__ import main
from graph.params_file import read_arrays, write_arrays
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from mxnet_compat import mx
from symbols import get_symbol
from training.initializer import initial_state

from mxnet.gluon import SymbolBlock  # isort: skip

OPTIONS = ["--depth", "8", "--data-type", "cifar10", "--num-classes", "5"]
INPUT = (2, 3, 32, 32)


@pytest.fixture
def checkpoint(tmp_path):
    """Prefix of a checkpoint of epoch 7, as training with the declared graph leaves it."""
    symbol = get_symbol("se_resnext", depth=8, data_type="cifar10", num_classes=5)
    shapes = parameter_shapes(parse(symbol.tojson()), {"data": INPUT, "softmax_label": INPUT[:1]})
    state = initial_state(shapes, seed=4)
    write_arrays(tmp_path / "run-0007.params", state.params)
    return tmp_path / "run"


def export(*argv: object) -> int:
    return run_command(lambda: main(["export", *map(str, argv)]))


def declared_logits(prefix, images: np.ndarray) -> np.ndarray:
    symbol = get_symbol("se_resnext", depth=8, data_type="cifar10", num_classes=5).get_internals()["fc1_output"]
    executor = symbol.simple_bind(mx.cpu(), grad_req="null", data=images.shape)
    arrays = read_arrays(f"{prefix}-0007.params")
    for name, array in executor.arg_dict.items():
        array[:] = images if name == "data" else arrays[f"arg:{name}"]
    for name, array in executor.aux_dict.items():
        array[:] = arrays[f"aux:{name}"]
    return executor.forward()[0].asnumpy()


def test_module_and_symbol_block_load_the_files(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "deployed"
    assert export("se_resnext", *OPTIONS, "--params", checkpoint, 7, "-o", out) == 0
    assert capsys.readouterr().out.split() == [f"{out}-symbol.json", f"{out}-0000.params"]
    images = np.random.RandomState(0).uniform(0, 255, INPUT).astype("float32")
    expected = declared_logits(checkpoint, images)

    symbol, arg_params, aux_params = mx.model.load_checkpoint(str(out), 0)
    module = mx.mod.Module(symbol, ["data"], None)
    module.bind([("data", INPUT)], for_training=False)
    module.set_params(arg_params, aux_params)
    module.forward(mx.io.DataBatch([mx.nd.array(images)]), is_train=False)
    np.testing.assert_allclose(module.get_outputs()[0].asnumpy(), expected, rtol=1e-5, atol=1e-4)

    block = SymbolBlock.imports(f"{out}-symbol.json", ["data"], f"{out}-0000.params")
    np.testing.assert_allclose(block(mx.nd.array(images)).asnumpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnext"], "network 'resnext' does not exist; choose one of se_resnext, "),
        (["se_resnext", "--depth", "20", *OPTIONS[2:]], "stage1_unit2_conv1_weight is missing"),
        (["se_resnext", *OPTIONS[:4], "--num-classes", "6"], "arg:fc1_bias is (5,) in the file and (6,)"),
        (["se_inception_v4", "--depth", "50"], "se_inception_v4 has no option depth; it has num_classes, "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(checkpoint, tmp_path, capsys, argv, message):
    assert export(*argv, "--params", checkpoint, 7, "-o", tmp_path / "out") == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("epoch", "message"), [("last", "number of an epoch"), ("8", "run-0008.params")])
def test_missing_checkpoint(checkpoint, tmp_path, capsys, epoch, message):
    assert export("se_resnext", *OPTIONS, "--params", checkpoint, epoch, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_output_that_cannot_be_written(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert export("se_resnext", *OPTIONS, "--params", checkpoint, 7, "-o", tmp_path / "file" / "out") == 1
    assert "choose another -o" in capsys.readouterr().err
