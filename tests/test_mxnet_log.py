"""Old logs: the text that MXNet's Module and FeedForward and the original training scripts wrote."""

from __future__ import annotations

import importlib.util
import logging
import math

import numpy as np
import pytest

from training.mxnet_log import parse_namespace, read_text_log
from training.run_log import Run, read_run

# The original scripts' log file: bare messages, FeedForward, so no training figures at an epoch's end.
FEED_FORWARD = """\
Namespace(aug_level=2, batch_size=192, data_type='imagenet', depth=50, gpus='0,1', lr=0.1, num_classes=1000, \
num_examples=1281167, retrain=False)
Start training with [gpu(0), gpu(1)]
Epoch[0] Batch [50]\tSpeed: 120.00 samples/sec\taccuracy=0.001000\ttop_k_accuracy_5=0.010000
Epoch[0] Batch [100]\tSpeed: 60.00 samples/sec\taccuracy=0.003000\ttop_k_accuracy_5=0.030000
Epoch[0] Resetting Data Iterator
Epoch[0] Time cost=100.500
Saved checkpoint to "./model/se-resnext-imagenet-50-0-0001.params"
Epoch[0] Validation-accuracy=0.051000
Epoch[0] Validation-top_k_accuracy_5=0.153000
Update[101]: Change learning rate to 1.00000e-02
Epoch[1] Batch [50]\tSpeed: 120.00 samples/sec\taccuracy=0.100000\ttop_k_accuracy_5=0.300000
Epoch[1] Time cost=99.500
Epoch[1] Validation-accuracy=0.210000
Epoch[1] Validation-top_k_accuracy_5=0.453000
Epoch[2] Batch [50]\tSpeed: 120.00 samples/sec\taccuracy=0.200000\ttop_k_accuracy_5=0.400000
"""

# Module.fit of MXNet before 1.0, the root logger's prefix, cross entropy as a third metric.
MODULE_0 = """\
INFO:root:Epoch[3] Batch [50] Speed: 123.4 samples/sec Train-accuracy=0.400000
INFO:root:Epoch[3] Batch [50] Speed: 123.4 samples/sec Train-cross-entropy=2.500000
INFO:root:Epoch[3] Batch [100] Speed: 123.4 samples/sec Train-accuracy=0.500000
INFO:root:Epoch[3] Batch [100] Speed: 123.4 samples/sec Train-cross-entropy=1.500000
INFO:root:Epoch[3] Train-accuracy=0.520000
INFO:root:Epoch[3] Train-top_k_accuracy_5=0.820000
INFO:root:Epoch[3] Time cost=728.322
INFO:root:Epoch[3] Validation-accuracy=0.460000
INFO:root:Epoch[3] Validation-top_k_accuracy_5=0.750000
INFO:root:Epoch[3] Validation-cross-entropy=2.100000
"""

# MXNet 1.x: ranges of batches; the scripts' console handler with its time stamp.
MODULE_1 = """\
2017-10-20 12:00:00,123 - Epoch[0] Batch [0-50]\tSpeed: 200.00 samples/sec\taccuracy=0.200000\tcross-entropy=3.0
2017-10-20 12:01:00,123 - Epoch[0] Batch [50-100]\tSpeed: 200.00 samples/sec\taccuracy=0.400000\tcross-entropy=nan
2017-10-20 12:01:30,123 - Epoch[0] Train-accuracy=0.310000
2017-10-20 12:01:30,124 - Epoch[0] Time cost=90.000
2017-10-20 12:02:00,123 - Epoch[0] Validation-accuracy=0.350000
"""


def read(tmp_path, text: str) -> Run:
    path = tmp_path / "log-se-resnext-imagenet-50.log"
    path.write_text(text, encoding="utf-8")
    return read_run(path)


def test_log_of_the_original_scripts(tmp_path):
    run = read(tmp_path, FEED_FORWARD)
    assert run.name == "log-se-resnext-imagenet-50"
    assert run.header["arguments"]["lr"] == 0.1
    assert run.header["arguments"]["gpus"] == "0,1"
    assert run.header["train_images"] == 1281167
    # MXNet's epoch 0 is completed epoch 1; the third one is not finished.
    assert [row["epoch"] for row in run.epochs] == [1, 2]
    assert run.values("top1", "train") == pytest.approx([0.002, 0.1])
    assert run.values("top5", "train") == pytest.approx([0.02, 0.3])
    assert run.values("top1", "validation") == [0.051, 0.21]
    assert run.values("top5", "validation") == [0.153, 0.453]
    assert run.values("lr") == [0.1, 0.01]
    assert run.values("elapsed") == [100.5, 200.0]
    assert run.values("images") == [1281167.0, 2562334.0]
    # Equal numbers of images at 120 and at 60 images/s take as long as all of them at 80.
    assert run.values("images_per_second") == pytest.approx([80.0, 120.0])
    assert [(row["epoch"], row["batch"]) for row in run.train] == [(1, 50), (1, 100), (2, 50), (3, 50)]


def test_module_log_before_1_0(tmp_path):
    run = read(tmp_path, MODULE_0)
    assert [row["epoch"] for row in run.epochs] == [4]
    # The figure at the end of the epoch wins over the batch lines; where there is none, they are averaged.
    assert run.epochs[0]["train"] == {"loss": 2.0, "top1": 0.52, "top5": 0.82}
    assert run.epochs[0]["validation"] == {"loss": 2.1, "top1": 0.46, "top5": 0.75}
    assert run.epochs[0]["seconds"] == 728.322
    assert run.header == {}
    assert math.isnan(run.values("images")[0])


def test_module_log_of_1_x(tmp_path):
    run = read(tmp_path, MODULE_1)
    assert run.values("top1", "train") == [0.31]
    assert math.isnan(run.values("loss", "train")[0])
    assert run.values("top1", "validation") == [0.35]
    assert math.isnan(run.values("top5", "validation")[0])


def test_running_means_replace_each_other():
    lines = [
        "Epoch[0] Batch [0-50]\tSpeed: 10 samples/sec\taccuracy=0.2",
        "Epoch[0] Batch [0-100]\tSpeed: 10 samples/sec\taccuracy=0.3",
        "Epoch[0] Time cost=1.0",
    ]
    assert read_text_log(lines)[-1]["train"]["top1"] == 0.3


def test_windows_count_by_their_batches():
    lines = [
        "Epoch[0] Batch [0-10]\tSpeed: 10 samples/sec\taccuracy=0.2",
        "Epoch[0] Batch [10-40]\tSpeed: 10 samples/sec\taccuracy=0.6",
        "Epoch[0] Time cost=1.0",
    ]
    assert read_text_log(lines)[-1]["train"]["top1"] == pytest.approx(0.5)


def epoch_lines(epoch: int, accuracy: float, seconds: float = 10.0) -> list[str]:
    return [
        f"Epoch[{epoch}] Batch [20]\tSpeed: 100.0 samples/sec\tTrain-accuracy={accuracy}",
        f"Epoch[{epoch}] Train-accuracy={accuracy}",
        f"Epoch[{epoch}] Time cost={seconds}",
        f"Epoch[{epoch}] Validation-accuracy={accuracy}",
    ]


def test_a_restart_goes_on_from_its_epoch(tmp_path):
    lines = [line for epoch in range(5) for line in epoch_lines(epoch, 0.1 * (epoch + 1))]
    lines += [line for epoch in (2, 3) for line in epoch_lines(epoch, 0.9, seconds=20.0)]
    run = read(tmp_path, "\n".join(lines))
    assert run.values("top1", "validation") == pytest.approx([0.1, 0.2, 0.9, 0.9])
    assert run.values("elapsed") == [10.0, 20.0, 40.0, 60.0]
    assert [row["epoch"] for row in run.train] == [1, 2, 3, 4]


def test_a_restart_within_an_epoch_forgets_its_first_lines():
    lines = [
        "Epoch[0] Batch [20]\tSpeed: 1.0 samples/sec\tTrain-accuracy=0.9",
        "Epoch[0] Batch [40]\tSpeed: 1.0 samples/sec\tTrain-accuracy=0.9",
        "Epoch[0] Batch [20]\tSpeed: 100.0 samples/sec\tTrain-accuracy=0.1",
        "Epoch[0] Time cost=10.0",
    ]
    record = read_text_log(lines)[-1]
    assert record["train"]["top1"] == 0.1
    assert record["images_per_second"] == pytest.approx(100.0)


def test_an_epoch_that_was_run_again_wins():
    lines = epoch_lines(0, 0.5) + epoch_lines(0, 0.7)
    (record,) = [record for record in read_text_log(lines) if record["type"] == "epoch"]
    assert record["train"]["top1"] == record["validation"]["top1"] == 0.7
    assert record["images_per_second"] == pytest.approx(100.0)


def test_a_lost_time_cost_leaves_the_time_unknown_from_there_on():
    lines = [line for epoch in range(3) for line in epoch_lines(epoch, 0.5) if "Epoch[1] Time" not in line]
    elapsed = [record["elapsed"] for record in read_text_log(lines) if record["type"] == "epoch"]
    assert elapsed == [10.0, None, None]


def test_namespace_with_values_that_are_no_literals():
    parsed = parse_namespace("Namespace(lr=0.1, path=PosixPath('/data'), steps=[30, 60], name=None)")
    assert parsed == {"lr": 0.1, "path": "PosixPath('/data')", "steps": [30, 60], "name": None}
    assert parse_namespace("Namespace(broken=") == {}


def test_a_sentence_may_follow_a_figure():
    (record,) = read_text_log(["Epoch[0] Validation-accuracy=0.5. Time cost=3.0, which is long"])
    assert (record["validation"], record["seconds"]) == ({"top1": 0.5}, 3.0)


def test_text_without_figures_gives_nothing():
    assert read_text_log(["Epoch by epoch we went", "accuracy=0.5", "Epoch[x] Train-accuracy=1"]) == []


def mxnet_fit(monkeypatch, messages: list[str], auto_reset: bool) -> None:
    """Train a tiny classifier with MXNet's own Module.fit, its log messages going into `messages`."""
    from mxnet_compat import mx

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 240)
    images = (labels[:, None] == np.arange(6)) + 0.3 * rng.standard_normal((240, 6))
    data = mx.io.NDArrayIter(images.astype(np.float32), labels.astype(np.float32), 10)
    network = mx.sym.SoftmaxOutput(mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=6, name="fc"), name="softmax")
    logger = logging.Logger("fit")
    handler = logging.Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(message)s"))
    handler.emit = lambda record: messages.append(handler.format(record))
    logger.addHandler(handler)
    # Speedometer and the scheduler log through the module, the rest through the logger that is passed.
    monkeypatch.setattr(logging, "info", logger.info)
    mx.mod.Module(network, logger=logger).fit(
        data,
        eval_data=data,
        eval_metric=["acc", mx.metric.create("top_k_accuracy", top_k=5), "ce"],
        num_epoch=3,
        batch_end_callback=mx.callback.Speedometer(10, 6, auto_reset=auto_reset),
        optimizer_params={"learning_rate": 0.5, "lr_scheduler": mx.lr_scheduler.FactorScheduler(24, 0.1, base_lr=0.5)},
    )


@pytest.mark.skipif(importlib.util.find_spec("mxnet") is None, reason="MXNet is not installed")
@pytest.mark.parametrize("auto_reset", [True, False])
def test_what_mxnet_really_writes_is_read(tmp_path, monkeypatch, auto_reset):
    messages: list[str] = []
    mxnet_fit(monkeypatch, messages, auto_reset)
    run = read(tmp_path, "\n".join(messages))
    assert [row["epoch"] for row in run.epochs] == [1, 2, 3]
    assert [row["batch"] for row in run.train if row["epoch"] == 2] == [6, 12, 18]
    for part in ("train", "validation"):
        for metric in ("top1", "top5", "loss"):
            assert np.isfinite(run.values(metric, part)).all()
    logged = [line.rpartition("=")[2] for line in messages if "Validation-accuracy" in line]
    assert run.values("top1", "validation") == [float(value) for value in logged]
    assert run.values("lr")[1:] == pytest.approx([0.05, 0.005])
    assert run.epochs[0]["images_per_second"] > 0
    assert run.values("elapsed")[2] > 0
