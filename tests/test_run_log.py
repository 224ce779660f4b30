"""The run log: lines that survive crashes, resumes and full disks; the progress of an epoch on the screen."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_samples import write_run

from engines.base import Metrics
from errors import ProjectError, UsageError
from training.progress import EpochProgress
from training.run_log import RunLog, read_run

METRICS = Metrics(count=200, loss_sum=100.0, top1_sum=150, top5_sum=190)
HEADER = {
    "arguments": {"lr": 0.1, "log_dir": Path("log/x"), "lr_steps": (30, 60)},
    "versions": {"numpy": "1.26.4"},
    "network": "se_resnext",
    "engine": "symbol",
    "parameters": 10,
    "multiply_adds": 20,
    "classes": 10,
    "train_images": 400,
    "val_images": 100,
    "steps_per_epoch": 4,
}


def log_epochs(log: RunLog, first: int, last: int, metrics: Metrics = METRICS) -> None:
    """Log epochs first..last of four batches, with a train line every second batch."""
    for epoch in range(first, last + 1):
        for batch in (2, 4):
            update = 4 * (epoch - 1) + batch
            log.train(
                epoch=epoch,
                batch=batch,
                update=update,
                images=100 * update,
                metrics=metrics,
                lr=np.float32(0.1),
                images_per_second=123.4,
                data_wait=0.02,
            )
        log.epoch(
            epoch=epoch,
            update=4 * epoch,
            images=400 * epoch,
            lr=0.1,
            train=metrics,
            validation=metrics if epoch > 1 else None,
            images_per_second=120.0,
            data_wait=0.02,
            seconds=3.5,
            peak_memory=123_456_789,
        )


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kinds(path: Path) -> list[str]:
    return [record["type"] for record in records(path)]


def test_lines_have_the_documented_fields(tmp_path):
    log = RunLog(tmp_path / "new" / "folder")
    log.header(**HEADER)
    log_epochs(log, 1, 2)
    header, train, *_ = records(log.path)
    assert header["arguments"] == {"lr": 0.1, "log_dir": "log/x", "lr_steps": [30, 60]}
    assert set(HEADER) | {"type", "time"} == set(header)
    assert (train["loss"], train["top1"], train["top5"]) == (0.5, 0.75, 0.95)
    assert {"epoch", "batch", "update", "images", "lr", "images_per_second", "data_wait", "elapsed"} < set(train)
    first, second = (record for record in records(log.path) if record["type"] == "epoch")
    assert first["validation"] is None
    assert second["validation"] == second["train"] == {"loss": 0.5, "top1": 0.75, "top5": 0.95}
    assert (second["seconds"], second["peak_memory"]) == (3.5, 123_456_789)
    text = log.text_path.read_text(encoding="utf-8")
    assert "epoch 2 batch 4/4" in text
    assert "; peak memory 123 MB\n" in text


def test_figures_that_are_not_finite_are_null_and_read_as_nan(tmp_path):
    log = RunLog(tmp_path)
    log_epochs(log, 1, 2, Metrics(count=10, loss_sum=math.inf, top1_sum=1, top5_sum=5))
    assert "Infinity" not in log.path.read_text(encoding="utf-8")
    assert all(math.isnan(value) for value in read_run(tmp_path).values("loss", "train"))


def test_resume_cuts_later_lines_and_writes_no_second_header(tmp_path):
    log = RunLog(tmp_path)
    log.header(**HEADER)
    log_epochs(log, 1, 3)
    whole = records(log.path)
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"type": "train", "epoch": 4, "upda')
    resumed = RunLog(tmp_path, (2, 0))
    resumed.header(**HEADER)
    assert records(log.path) == whole[:7]
    log_epochs(resumed, 3, 3)
    assert kinds(log.path) == ["header"] + ["train", "train", "epoch"] * 3
    assert [record["update"] for record in records(log.path)[1:]] == [2, 4, 4, 6, 8, 8, 10, 12, 12]
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*"))


def test_resume_between_the_last_batch_and_the_end_of_its_epoch_cuts_the_epoch_line(tmp_path):
    log = RunLog(tmp_path)
    log_epochs(log, 1, 2)
    RunLog(tmp_path, (1, 4))
    assert kinds(log.path) == ["train", "train", "epoch", "train", "train"]


def test_resume_inside_an_epoch_cuts_after_its_batch(tmp_path):
    log = RunLog(tmp_path)
    log_epochs(log, 1, 2)
    RunLog(tmp_path, (1, 3))
    assert [(record["type"], record["epoch"]) for record in records(log.path)] == [
        ("train", 1), ("train", 1), ("epoch", 1), ("train", 2),
    ]  # fmt: skip


def test_time_goes_on_after_a_resume(tmp_path):
    path = write_run(tmp_path, epochs=4)
    before = records(path)[2]["elapsed"]
    assert before <= RunLog(tmp_path, (2, 0)).elapsed < before + 5


def test_resume_without_a_log_starts_one(tmp_path):
    log = RunLog(tmp_path, (2, 0))
    log.header(**HEADER)
    assert kinds(log.path) == ["header"]


def test_a_fresh_run_keeps_the_logs_of_older_ones(tmp_path):
    for number in range(3):
        log = RunLog(tmp_path)
        log.header(**{**HEADER, "parameters": number})
        log.message(f"run {number}", echo=False)
    parameters = {path.name: records(path)[0]["parameters"] for path in tmp_path.glob("run*.jsonl")}
    assert parameters == {"run-1.jsonl": 0, "run-2.jsonl": 1, "run.jsonl": 2}
    assert "run 1" in (tmp_path / "train-2.log").read_text(encoding="utf-8")


def test_a_folder_that_vanishes_is_warned_of_once(tmp_path, capsys):
    log = RunLog(tmp_path / "log")
    log.text_path.unlink()
    log.folder.rmdir()
    log_epochs(log, 1, 2)
    assert capsys.readouterr().err.count("warning:") == 1
    log.folder.mkdir()
    log_epochs(log, 3, 3)
    assert kinds(log.path) == ["train", "train", "epoch"]


def test_a_full_disk_leaves_no_torn_line(tmp_path, capsys, file_size_limit):
    log = RunLog(tmp_path)
    log_epochs(log, 1, 1)
    written = log.path.read_bytes()
    # The system accepts the first 20 bytes of the next line, then none.
    with file_size_limit(len(written) + 20):
        log_epochs(log, 2, 2)
    assert log.path.read_bytes() == written
    assert capsys.readouterr().err.count("warning:") == 1
    log_epochs(log, 3, 3)
    assert [record["epoch"] for record in records(log.path)] == [1, 1, 1, 3, 3, 3]


def test_a_log_folder_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="--log-dir"):
        RunLog(tmp_path / "file" / "log")


def test_reading_a_run(tmp_path):
    path = write_run(tmp_path / "se", epochs=3)
    run = read_run(path.parent)
    assert (run.name, run.path, len(run.epochs)) == ("se", path, 3)
    assert run.header["engine"] == "symbol"
    assert run.values("images") == [6000.0, 12000.0, 18000.0]
    accuracies = run.values("top1", "validation")
    assert run.best_epoch() == (accuracies.index(max(accuracies)) + 1, max(accuracies))


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = write_run(tmp_path, epochs=3)
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["epoch"] for row in read_run(path).epochs] == [1, 2]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no lines of a training log"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "no lines of a training log"),
        (b'{"type": "header"}\n', "no epoch is finished yet"),
        (b'{"some": "json"}\n', "no lines of a training log"),
        (b'{"type": "train", "epoch": 1, "update": 2}\n', "no epoch is finished"),
    ],
)
def test_files_that_are_no_log_are_named(tmp_path, content, complaint):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    with pytest.raises(ProjectError, match=complaint) as error:
        read_run(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ProjectError, match=r"gone\.jsonl: No such file"):
        read_run(tmp_path / "gone.jsonl")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal():
    screen = io.StringIO()
    with EpochProgress(100, 2, 5, initial=50, file=screen, interval=0) as progress:
        progress.update(75, METRICS, 0.1, 1234.5, 0.02)
        progress.update(100)
    first, last = screen.getvalue().splitlines()
    assert first.startswith("epoch 2/5: batch 75/100, 1234 images/s, loss 0.5000, top-1 75.00%, top-5 95.00%, rate 0.1")
    assert "waiting for data 2%" in first
    assert first.endswith("left")
    assert "batch 100/100" in last
    assert "loss 0.5000" in last


def test_plain_lines_keep_their_interval():
    screen = io.StringIO()
    with EpochProgress(100, 1, 1, file=screen, interval=3600) as progress:
        for batch in range(1, 101):
            progress.update(batch, METRICS, 0.1, 50.0, 0.0)
    assert len(screen.getvalue().splitlines()) == 1


def test_a_bar_on_a_terminal():
    screen = Terminal()
    with EpochProgress(100, 1, 5, file=screen) as progress:
        progress.update(50, METRICS, 0.1, 99.5, 0.25)
    shown = screen.getvalue()
    for part in ("epoch 1/5", "50/100", "99.5 images/s", "top-5 95.00%", "rate 0.1", "waiting for data 25%"):
        assert part in shown


def test_values_of_a_wrong_kind_are_no_figures(tmp_path):
    lines = [
        '{"type": "epoch", "epoch": 1, "update": 4, "lr": "x", "train": [], "validation": {"top1": 0.5, "loss": {}}}',
        '{"type": "epoch", "epoch": "two", "update": 8}',
        '{"type": "epoch", "epoch": 2}',
        '["epoch"]',
    ]
    (tmp_path / "run.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.values("top1", "validation") == [0.5]
    assert np.isnan([run.values("lr"), run.values("top1", "train"), run.values("loss", "validation")]).all()
