"""Comparisons: grouping by seed, the tables, the self-contained report and the command."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from run_samples import write_run

import compare as compare_command
from errors import run_command
from training.comparison import (
    compare,
    csv_table,
    differences,
    duration,
    group_by_seed,
    markdown_table,
    reading,
)
from training.curves import Group
from training.report import html_report
from training.run_log import read_run

OLD_LOG = """\
Namespace(batch_size=64, depth=20, lr=0.1, num_examples=6000, num_classes=10)
Epoch[0] Batch [50]\tSpeed: 200.00 samples/sec\taccuracy=0.5\ttop_k_accuracy_5=0.8
Epoch[0] Time cost=30.0
Epoch[0] Validation-accuracy=0.6
Epoch[0] Validation-top_k_accuracy_5=0.9
"""


def write_runs(folder, name: str, seeds: int = 3, epochs: int = 4, **options) -> list:
    return [
        write_run(folder / f"{name}-seed{seed}", epochs, seed=seed, frequent=50 + seed, **options)
        for seed in range(seeds)
    ]


@pytest.fixture
def runs(tmp_path):
    """Three seeds of a network and of its plain twin."""
    paths = write_runs(tmp_path, "se", floor=0.05) + write_runs(tmp_path, "plain", floor=0.30, no_se=True)
    return [read_run(path) for path in paths]


def test_runs_that_differ_only_in_seed_and_places_share_a_line(runs):
    groups = group_by_seed([runs[0], runs[3], *runs[1:3], *runs[4:]])
    assert [group.label for group in groups] == ["se (3 seeds)", "plain (3 seeds)"]
    assert [[run.name for run in group.runs] for group in groups] == [
        ["se-seed0", "se-seed1", "se-seed2"],
        ["plain-seed0", "plain-seed1", "plain-seed2"],
    ]


def test_another_dataset_under_the_same_flags_is_another_line(runs):
    runs[1].header["train_images"] = 60000
    assert [len(group.runs) for group in group_by_seed(runs[:3])] == [2, 1]


def test_weights_from_elsewhere_make_another_line(tmp_path):
    finetuned = [
        read_run(write_run(tmp_path / f"run{seed}", 3, seed=seed, model_load_prefix=prefix, model_load_epoch=9))
        for seed, prefix in enumerate(("imagenet", "imagenet", "other"))
    ]
    assert [len(group.runs) for group in group_by_seed(finetuned)] == [2, 1]


def test_a_repeated_seed_is_no_further_seed(tmp_path):
    again = [read_run(write_run(tmp_path / f"run{place}", 3, seed=0)) for place in range(2)]
    assert [len(group.runs) for group in group_by_seed(again)] == [1, 1]


def test_logs_without_a_seed_stay_alone(tmp_path):
    for name in ("one.log", "two.log"):
        (tmp_path / name).write_text(OLD_LOG, encoding="utf-8")
    groups = group_by_seed([read_run(tmp_path / "one.log"), read_run(tmp_path / "two.log")])
    assert [group.label for group in groups] == ["one", "two"]


def test_figures_are_mean_and_range_of_the_runs(runs):
    row = compare([Group("se", runs[:3])])[0]
    accuracies = np.array([run.values("top1", "validation") for run in runs[:3]])
    best, final = 100 * accuracies.max(axis=1), 100 * accuracies[:, -1]
    spread = row.spreads["best_top1_percent"]
    assert (spread.mean, spread.low, spread.high) == pytest.approx((best.mean(), best.min(), best.max()))
    assert row.spreads["final_top1_percent"].mean == pytest.approx(final.mean())
    assert row.spreads["seconds"].low == 60.0
    assert row.spreads["parameters"].mean == 1_234_567
    assert row.spreads["multiply_adds"].mean == 98_765_432
    assert row.spreads["images_per_second"].mean == pytest.approx(400, abs=10)


def test_tables_hold_every_line(runs, tmp_path):
    (tmp_path / "old.log").write_text(OLD_LOG, encoding="utf-8")
    rows = compare(group_by_seed([*runs, read_run(tmp_path / "old.log")]))
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "| **9" in lines[2]
    assert lines[4].startswith("| old | 1 | 60.00 | 60.00 | 90.00 | 90.00 | 200 | 30.0 s | - | - |")
    table = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert [line["seeds"] for line in table] == ["0 1 2", "0 1 2", ""]
    assert float(table[0]["final_top1_percent_high"]) == pytest.approx(rows[0].spreads["final_top1_percent"].high)
    assert table[2]["parameters_mean"] == ""
    assert table[2]["logs"] == str(tmp_path / "old.log")


def test_reading_says_whether_ranges_overlap(runs, tmp_path):
    sentences = reading(compare(group_by_seed(runs)))
    assert sentences[0].startswith("Highest final top-1 on validation: se (3 seeds)")
    assert sentences[1].endswith("do not overlap.")
    near = [read_run(path) for path in write_runs(tmp_path / "near", "near", floor=0.0501, no_se=True)]
    assert "may be chance" in reading(compare(group_by_seed(runs[:3] + near)))[1]
    alone = reading(compare([Group("a", runs[:1]), Group("b", runs[3:4])]))
    assert "spread is not known" in alone[1]


def test_differing_arguments_come_first_and_seeds_never_differ(runs):
    rows = differences(group_by_seed(runs))
    assert rows[0] == ("no_se", ["False", "True"], True)
    assert [name for name, _, differs in rows if differs] == ["no_se"]
    assert ("seed", ["0, 1, 2", "0, 1, 2"], False) in rows
    del runs[0].header["arguments"]["depth"], runs[0].header["arguments"]["no_se"]
    assert not any(differs for _, _, differs in differences([Group("a", runs[:1]), Group("b", runs[3:])]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (303, "5 min 03 s"), (3599.7, "1 h 00 min"), (25500, "7 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Page(HTMLParser):
    """Collects ids, addresses and the nesting of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run_main(*arguments: object) -> int:
    return run_command(lambda: compare_command.main([str(argument) for argument in arguments]))


def test_command_writes_a_report_that_needs_no_other_file(runs, tmp_path, capsys):
    (tmp_path / "old.log").write_text(OLD_LOG, encoding="utf-8")
    out = tmp_path / "out" / "comparison"
    logs = [*(run.path for run in runs), tmp_path / "old.log", tmp_path / "gone.log"]
    assert run_main(*logs, "-o", out, "--title", "SE & plain <twins>") == 0
    printed = capsys.readouterr()
    assert "se (3 seeds)" in printed.out
    assert "gone.log" in printed.err
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "table.md",
        "table.csv",
        *(f"curves-{axis}.{kind}" for axis in ("epochs", "images", "time") for kind in ("png", "svg")),
    }
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert "SE &amp; plain &lt;twins&gt;" in text
    assert "gone.log" in text
    assert "<tr class=differs><th>no_se</th>" in text
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_command_shows_runs_on_their_own_when_asked(runs, tmp_path, capsys):
    assert run_main(*(run.path for run in runs[:2]), "-o", tmp_path / "out", "--no-seed-groups") == 0
    printed = capsys.readouterr().out
    assert "se-seed0" in printed
    assert "seeds)" not in printed


def test_groups_that_ended_unevenly_are_noted(tmp_path, capsys):
    short = write_run(tmp_path / "se-seed0", 3, seed=0, lr_steps=[])
    longer = write_run(tmp_path / "se-seed1", 5, seed=1, lr_steps=[])
    assert run_main(short, longer, "-o", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "3 to 5 epochs" in printed
    assert "| 3 to 5 |" in printed


def test_nothing_to_compare_is_status_2(tmp_path, capsys):
    assert run_main(tmp_path / "gone.jsonl", "-o", tmp_path / "out") == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_a_folder_is_status_2(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run_main(runs[0].path, "-o", tmp_path / "file") == 2
    assert "change -o" in capsys.readouterr().err


def test_a_report_without_arguments_says_so(tmp_path):
    (tmp_path / "old.log").write_text("Epoch[0] Validation-accuracy=0.6\n", encoding="utf-8")
    rows = compare(group_by_seed([read_run(tmp_path / "old.log")]))
    assert "The logs hold no arguments" in html_report("T", rows, {})
