"""Curves: what is drawn for which runs, and the command that draws them."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from run_samples import write_run

import plot_curves
from errors import UsageError, run_command
from training.curves import COLOURS, Group, draw_curves, legend_label, picture_bytes, rate_steps, read_runs
from training.run_log import Run, read_run

ROOT = Path(__file__).resolve().parent.parent
OLD_LOG = """\
INFO:root:Epoch[0] Train-accuracy=0.5
INFO:root:Epoch[0] Validation-accuracy=0.4
INFO:root:Epoch[1] Train-accuracy=0.7
INFO:root:Epoch[1] Validation-accuracy=0.6
"""


def singles(*paths: Path) -> list[Group]:
    return [Group(run.name, [run]) for run in read_runs(paths)[0]]


def run_main(*arguments: object) -> int:
    return run_command(lambda: plot_curves.main([str(argument) for argument in arguments]))


def curves_of(axes) -> dict[tuple[str, str], np.ndarray]:
    """(colour, "validation" or "training") -> y values of the long lines in a diagram."""
    found = {}
    for line in axes.get_lines():
        if len(line.get_xdata()) > 1 and line.get_linestyle() != ":":
            kind = "validation" if line.get_linestyle() == "-" else "training"
            found[line.get_color(), kind] = line.get_ydata()
    return found


def test_errors_and_losses_of_every_run_are_drawn(tmp_path):
    paths = [write_run(tmp_path / f"run{seed}", epochs=6, seed=seed) for seed in range(2)]
    figure = draw_curves(singles(*paths))
    assert [axes.get_title() for axes in figure.axes] == ["Top-1 error", "Top-5 error", "Loss"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["top-1 error (%)", "top-5 error (%)", "cross entropy (nats)"]
    for axes, metric in zip(figure.axes, ("top1", "top5", "loss")):
        drawn = curves_of(axes)
        assert len(drawn) == 4
        for path, colour in zip(paths, COLOURS):
            logged = np.array(read_run(path).values(metric, "validation"))
            expected = logged if metric == "loss" else 100 * (1 - logged)
            np.testing.assert_allclose(drawn[colour, "validation"], expected)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    best_epoch, best = read_run(paths[0]).best_epoch()
    assert legend[0].startswith(f"run0: best epoch {best_epoch}, top-1 error {100 * (1 - best):.2f} %, top-5 ")


def test_legends_cover_no_diagram(tmp_path):
    paths = [write_run(tmp_path / f"some-rather-long-name-of-a-run-{seed}", 5, seed=seed) for seed in range(9)]
    figure = draw_curves(singles(*paths))
    figure.draw_without_rendering()
    for legend in figure.legends:
        frame = legend.get_window_extent()
        assert not any(frame.overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert figure.bbox.x0 <= frame.x0
        assert frame.x1 <= figure.bbox.x1


def test_nine_runs_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / f"run{seed}", 5, seed=seed) for seed in range(9)]
    handles = draw_curves(singles(*paths)).legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 9


def test_figures_that_no_log_has_are_left_out(tmp_path):
    path = tmp_path / "old.log"
    path.write_text(OLD_LOG, encoding="utf-8")
    assert [axes.get_title() for axes in draw_curves(singles(path)).axes] == ["Top-1 error"]


def rates_run(rates: list[float]) -> Run:
    return Run("x", Path("x"), epochs=[{"epoch": at, "lr": rate} for at, rate in enumerate(rates, 1)])


@pytest.mark.parametrize(
    ("rates", "steps"),
    [
        ([0.1] * 4, []),
        ([0.1, 0.1, 0.01, 0.01, 0.001], [(2, 0.01), (4, 0.001)]),
        ([0.1, 0.1, 0.01, 0.001, 0.001], [(2, 0.01), (3, 0.001)]),
        ([0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.008], [(6, 0.008)]),
        ([0.1, 0.09, 0.07, 0.04, 0.01, 0.0], []),
        ([float("nan"), 0.1, 0.01], [(2, 0.01)]),
    ],
)
def test_steps_are_told_from_ramps(rates, steps):
    assert rate_steps(rates_run(rates)) == steps


def test_rate_steps_are_marked(tmp_path):
    figure = draw_curves(singles(write_run(tmp_path / "run", epochs=10, lr_steps=[5, 7])))
    marked = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert marked == [5, 7]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.01", "0.001"]


@pytest.mark.parametrize(
    ("axis", "label", "last"),
    [("images", "images seen (thousands)", 24.0), ("time", "wall-clock time (s)", 60.0), ("epochs", "epoch", 4.0)],
)
def test_axes_have_fitting_units(tmp_path, axis, label, last):
    figure = draw_curves(singles(write_run(tmp_path / "run", epochs=4)), axis)
    assert figure.axes[0].get_xlabel() == label
    assert figure.axes[0].get_lines()[0].get_xdata()[-1] == last


def test_seeds_are_drawn_as_mean_and_range(tmp_path):
    runs = [read_run(write_run(tmp_path / f"seed{seed}", 8 - seed, seed=seed, lr_steps=[])) for seed in range(3)]
    group = Group("se (3 seeds)", runs)
    figure = draw_curves([group])
    values = 100 * (1 - np.array([run.values("top1", "validation")[:6] for run in runs]))
    drawn = curves_of(figure.axes[0])[COLOURS[0], "validation"]
    # The third run ended after six epochs, and so does the mean.
    np.testing.assert_allclose(drawn, values.mean(axis=0))
    bands = [band.get_paths()[0].vertices[:, 1] for band in figure.axes[0].collections]
    assert any(np.isclose(band.min(), values.min()) and np.isclose(band.max(), values.max()) for band in bands)
    assert "range over seeds" in [text.get_text() for text in figure.legends[1].get_texts()]


def test_a_diverged_loss_leaves_a_gap_and_readable_limits(tmp_path):
    path = write_run(tmp_path / "run", epochs=80)
    text = path.read_text(encoding="utf-8").splitlines()
    text[40] = text[40].replace('"loss": ', '"loss": 1e9, "x": ')
    text[41] = text[41].replace('"loss": ', '"loss": null, "x": ')
    path.write_text("\n".join(text), encoding="utf-8")
    assert draw_curves(singles(path)).axes[2].get_ylim()[1] < 10


def test_a_run_without_validation_names_its_training_best(tmp_path):
    path = write_run(tmp_path / "run", epochs=3)
    run = read_run(path)
    for row in run.epochs:
        row["validation"] = None
    assert legend_label(Group("run", [run])).endswith("(training)")
    draw_curves([Group("run", [run])])


def test_equal_curves_make_equal_files(tmp_path):
    groups = singles(write_run(tmp_path / "run", epochs=3))
    for kind in ("png", "svg"):
        assert picture_bytes(draw_curves(groups), kind) == picture_bytes(draw_curves(groups), kind)


def test_runs_of_equal_names_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / day / "se", epochs=2) for day in ("monday", "tuesday")]
    paths.append(write_run(tmp_path / "plain", epochs=2))
    runs, _ = read_runs([*paths, paths[0]])
    assert len({run.name for run in runs}) == len(runs) == 3
    assert "monday" in runs[0].name
    assert runs[2].name == "plain"


def test_command_draws_both_kinds_of_logs_as_png_and_svg(tmp_path, capsys):
    ours = write_run(tmp_path / "ours", epochs=3)
    old = tmp_path / "old.log"
    old.write_text(OLD_LOG, encoding="utf-8")
    assert run_main(ours, old, "-o", tmp_path / "curves.png") == 0
    assert "curves of 2 runs" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run_main(ours, old, "-o", tmp_path / "curves.svg", "--x", "epochs", "--title", "T") == 0
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")


def test_an_unreadable_log_is_named_and_the_rest_is_drawn(tmp_path, capsys):
    ours = write_run(tmp_path / "ours", epochs=3)
    (tmp_path / "broken.jsonl").write_bytes(b"\x00\x01")
    status = run_main(tmp_path / "broken.jsonl", ours, tmp_path / "gone.jsonl", "-o", tmp_path / "curves.png")
    assert status == 0
    warnings = capsys.readouterr().err
    assert "broken.jsonl" in warnings
    assert "gone.jsonl" in warnings
    assert (tmp_path / "curves.png").exists()


def test_nothing_to_draw_is_status_2(tmp_path):
    command = [sys.executable, "plot_curves.py", str(tmp_path / "gone.jsonl"), "-o", str(tmp_path / "curves.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "gone.jsonl" in result.stderr
    assert "nothing to draw" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "curves.png").exists()


def test_an_output_that_cannot_be_is_status_2(tmp_path, capsys):
    ours = write_run(tmp_path / "ours", epochs=2)
    assert run_main(ours, "-o", tmp_path / "curves.jpeg") == 2
    assert ".png or .svg" in capsys.readouterr().err
    assert run_main(ours, "-o", tmp_path / "no" / "folder" / "curves.png") == 2
    assert "cannot write" in capsys.readouterr().err


def test_an_axis_that_no_log_tells_is_an_error(tmp_path, capsys):
    old = tmp_path / "old.log"
    old.write_text(OLD_LOG, encoding="utf-8")
    assert run_main(old, "-o", tmp_path / "curves.png", "--x", "time") != 0
    assert "by wall-clock time" in capsys.readouterr().err


def test_read_runs_refuses_when_nothing_can_be_read(tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        read_runs([tmp_path / "gone"])
