"""Trained networks outside of training: `python -m graph export-onnx`, `export-torch` and `run`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import graph.export_onnx
from errors import ProjectError, UsageError, run_command
from graph import export_onnx, export_torch, run
from graph.params_file import read_arrays, write_arrays
from graph.shapes import parameter_shapes
from graph.symbol_json import GraphError, parse
from graph.trained import check_same, load_trained, logits, training_arguments
from symbols import get_symbol_json
from tests.graph_checks import value

SIZE, CLASSES = 32, 10


@pytest.fixture
def prefix(tmp_path) -> str:
    """A small network after three epochs, as a training run leaves it."""
    prefix = str(tmp_path / "net")
    text = get_symbol_json("se_resnext", depth=20, data_type="cifar10", num_classes=CLASSES, image_size=SIZE)
    Path(f"{prefix}-symbol.json").write_text(text)
    inputs = {"data": (1, 3, SIZE, SIZE), "softmax_label": (1,)}
    shapes = parameter_shapes(parse(text), inputs)
    params = {name: value(name, shape) for name, shape in shapes.items()}
    params["arg:fc1_weight"] /= 100  # no class is certain
    write_arrays(f"{prefix}-0003.params", params)
    Path(f"{prefix}-0003.json").write_text(json.dumps({"arguments": {"image_size": SIZE, "val_resize": 40}}))
    return prefix


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (rows, 3, SIZE, SIZE)).astype(np.float32)


def expected_logits(prefix: str, data: np.ndarray) -> np.ndarray:
    return logits(load_trained(prefix, 3).module, torch.from_numpy(data)).numpy()


def test_onnx_file_computes_the_logits_for_any_batch(prefix, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    assert export_onnx.main([prefix, "3", "-o", str(path)]) == 0
    assert "logits within" in capsys.readouterr().out
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["data"]
    for rows in (1, 7):
        (found,) = session.run(["logits"], {"data": images(rows)})
        expected = expected_logits(prefix, images(rows))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("command", [export_onnx, export_torch])
def test_an_export_that_deviates_does_not_replace_the_file(prefix, tmp_path, command, monkeypatch):
    path = tmp_path / "net.out"
    path.write_text("earlier export")
    monkeypatch.setattr("graph.trained.TOLERANCE", -1.0)
    with pytest.raises(ProjectError, match="deviates from the graph by .*; not written"):
        command.main([prefix, "3", "-o", str(path)])
    assert path.read_text() == "earlier export"
    assert sorted(entry.name for entry in tmp_path.iterdir() if "net.out" in entry.name) == ["net.out"]


def test_results_that_are_no_numbers_or_of_another_shape_are_deviations(prefix):
    trained = load_trained(prefix, 3)
    with pytest.raises(ProjectError, match="deviates"):
        check_same(trained, lambda data: np.full((len(data), CLASSES), np.nan), "this")
    with pytest.raises(ProjectError, match=r"this gives \(1, 3\) for 1 images, the graph \(1, 10\)"):
        check_same(trained, lambda data: np.zeros((len(data), 3)), "this")


def test_exported_program_computes_the_logits_for_any_batch(prefix, tmp_path):
    path = tmp_path / "net.pt2"
    assert export_torch.main([prefix, "3", "-o", str(path)]) == 0
    found = torch.export.load(str(path)).module()(torch.from_numpy(images(5))).detach().numpy()
    expected = expected_logits(prefix, images(5))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_missing_package_is_named(prefix, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    arguments = [prefix, "3", "-o", str(tmp_path / "net.onnx")]
    assert run_command(lambda: graph.export_onnx.main(arguments)) == 1
    assert "'onnxscript' is not installed: pip install -r requirements-onnx.txt" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(prefix, tmp_path):
    with pytest.raises(ProjectError, match="cannot be written .*; choose another -o"):
        export_torch.main([prefix, "3", "-o", str(tmp_path / "missing" / "net.pt2")])


def test_differences_between_params_and_graph_are_listed_together(prefix):
    params = read_arrays(f"{prefix}-0003.params")
    del params["arg:conv0_weight"]
    params["arg:fc1_bias"] = np.zeros(11, np.float32)
    params["aux:extra"] = np.zeros(1, np.float32)
    write_arrays(f"{prefix}-0004.params", params)
    with pytest.raises(UsageError) as caught:
        load_trained(prefix, 4)
    message = str(caught.value)
    assert f"{prefix}-0004.params: " in message
    assert "arg:conv0_weight is missing" in message
    assert "arg:fc1_bias is (11,), the graph needs (10,)" in message
    assert "aux:extra is not in the graph" in message
    assert "\n" not in message


def test_missing_files_and_sizes(prefix):
    with pytest.raises(UsageError, match="net-0009.params: no such file; saved epochs: 3$"):
        load_trained(prefix, 9)
    shutil.copy(f"{prefix}-symbol.json", f"{prefix}2-symbol.json")
    with pytest.raises(UsageError, match="net2-0003.params: no such file; no epoch of .*net2 is there"):
        load_trained(f"{prefix}2", 3)
    with pytest.raises(GraphError, match="nothing-symbol.json"):
        load_trained("nothing", 1)
    with pytest.raises(UsageError, match="--image-size 0"):
        load_trained(prefix, 3, 0)
    assert load_trained(prefix, 3).image_size == SIZE
    assert training_arguments(Path(f"{prefix}-0009.json")) == {}


@pytest.fixture
def picture(tmp_path) -> str:
    path = str(tmp_path / "picture.png")
    cv2.imwrite(path, np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return path


def test_run_prints_the_most_probable_classes(prefix, picture, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("".join(f"name {label}\n" for label in range(CLASSES)))
    assert run.main([prefix, "3", picture, picture, "--classes", str(tmp_path / "classes.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[:6] == lines[6:]
    # The short edge is 40 as the run's --val-resize asks, so that validation sees the middle 32 pixels unscaled.
    middle = cv2.cvtColor(cv2.imread(picture), cv2.COLOR_BGR2RGB)[4:36, 14:46]
    expected = expected_logits(prefix, middle.transpose(2, 0, 1)[None].astype(np.float32))[0]
    order = np.argsort(-expected)[:5]
    probabilities = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
    assert lines[0] == picture
    assert [line.split("%")[1].strip() for line in lines[1:6]] == [f"name {label}" for label in order]
    assert [float(line.split("%")[0]) for line in lines[1:6]] == pytest.approx(100 * probabilities[order], abs=0.02)


def test_run_without_names(prefix, picture, capsys):
    assert run.main([prefix, "3", picture]) == 0
    assert "%  class " in capsys.readouterr().out


@pytest.mark.parametrize(("count", "found"), [(CLASSES, "%  kind "), (CLASSES + 1, "%  class ")])
def test_run_takes_the_names_beside_the_packs(prefix, picture, tmp_path, capsys, count, found):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "classes.txt").write_text("".join(f"kind {label}\n" for label in range(count)))
    arguments = {"image_size": SIZE, "train_rec": str(tmp_path / "data" / "train.rec"), "val_rec": None}
    Path(f"{prefix}-0003.json").write_text(json.dumps({"arguments": arguments}))
    assert run.main([prefix, "3", picture]) == 0
    output = capsys.readouterr()
    assert output.out.count(found) == 5
    assert output.err == (f"names of the classes from {tmp_path}/data/classes.txt\n" if count == CLASSES else "")


def test_names_that_cannot_be_read_are_done_without_unless_asked_for(prefix, picture, tmp_path, capsys):
    names = tmp_path / "classes.txt"
    names.write_bytes("".join(f"caf\u00e9 {label}\n" for label in range(CLASSES)).encode("latin-1"))
    Path(f"{prefix}-0003.json").write_text(json.dumps({"arguments": {"train_rec": str(tmp_path / "train.rec")}}))
    assert run.main([prefix, "3", picture, "--image-size", str(SIZE)]) == 0
    assert "%  class " in capsys.readouterr().out
    # ImageNet has two classes that are called crane.
    names.write_text("crane\n" * CLASSES)
    assert run.main([prefix, "3", picture, "--image-size", str(SIZE), "--classes", str(names)]) == 0
    assert capsys.readouterr().out.count("%  crane") == 5
    names.write_bytes(b"caf\xe9\n")
    with pytest.raises(UsageError, match="classes.txt: is no text in UTF-8"):
        run.main([prefix, "3", picture, "--classes", str(names)])


def test_run_refuses_in_one_line(prefix, picture, tmp_path):
    with pytest.raises(UsageError, match="no such image: a.jpg, b.jpg"):
        run.main([prefix, "3", "a.jpg", picture, "b.jpg"])
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="names 2 classes, the network has 10"):
        run.main([prefix, "3", picture, "--classes", str(tmp_path / "classes.txt")])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(UsageError, match="broken.jpg: "):
        run.main([prefix, "3", str(broken)])
