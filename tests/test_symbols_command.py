"""`python -m symbols`: table, JSON, picture, and its answers to mistakes."""

from __future__ import annotations

import shutil

import pytest

from errors import run_command
from mxnet_compat import mx
from symbols.__main__ import main


def command(*argv: object) -> int:
    try:
        return run_command(lambda: main([str(part) for part in argv]))
    except SystemExit as error:
        return error.code


def test_summary_prints_layers_and_totals(capsys):
    assert command("summary", "se_resnext", "--depth", 50) == 0
    out = capsys.readouterr().out
    assert "27,559,902 parameters, 4.253 G multiply-adds" in out
    first = next(line for line in out.splitlines() if line.startswith("conv0 "))
    assert " ".join(first.split()) == "conv0 Convolution 64 x 112 x 112 9,408 118,013,952"


def test_summary_of_the_plain_twin(capsys):
    assert command("summary", "se_resnext", "--depth", 50, "--no-se") == 0
    assert "25,028,910 parameters" in capsys.readouterr().out


def test_export_is_read_by_mxnet(tmp_path):
    path = tmp_path / "net.json"
    assert command("export", "se_resnet", "--depth", 18, "-o", path) == 0
    assert mx.sym.load(str(path)).list_outputs() == ["softmax_output"]


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_plot_draws_an_svg(tmp_path):
    path = tmp_path / "net.svg"
    assert command("plot", "se_resnext", "--depth", 20, "--data-type", "cifar10", "-o", path) == 0
    picture = path.read_text()
    assert "<svg" in picture
    assert "stage1_unit1_conv1" in picture


def test_plot_without_dot_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("plot", "se_resnext", "--depth", 20, "--data-type", "cifar10", "-o", tmp_path / "net.svg") == 1
    assert "apt-get install graphviz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["summary", "se_vgg"], "se_vgg"),
        (["summary", "se_resnext", "--depth", 51], "51"),
        (["summary", "se_resnext", "--num-group", 7], "num_group 7"),
        (["summary", "se_inception_v4", "--depth", 50], "no option depth"),
        (["plot", "se_resnext", "-o", "net.jpg"], ".svg"),
    ],
    ids=str,
)
def test_mistakes(capsys, argv, fragment):
    assert command(*argv) == 2
    assert fragment in capsys.readouterr().err
