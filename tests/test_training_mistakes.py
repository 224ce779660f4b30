"""Mistakes a user can make: one line, a way out, the right exit status, and nothing done before."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import read_lines, start_training, write_pack
from data_prep.recordio import Header, RecordWriter, pack
from training.options import parse_args


def truncated(path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def refuse(train, argv, capfd, *fragments: str) -> None:
    """The run ends with status 2 and its last line, which is the only one, names every fragment."""
    assert train(argv) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error:")]) == 1, lines
    for fragment in fragments:
        assert fragment in lines[-1], lines[-1]


FLAG_MISTAKES = [
    ({"network": "se_vgg"}, ["se_vgg", "se_resnext"]),
    ({"depth": 21}, ["21"]),
    ({"depth": 164, "num_group": 7}, ["num_group 7"]),
    ({"network": "se_inception_v4", "depth": 50}, ["has no --depth"]),
    ({"batch_size": 500}, ["larger than the dataset", "84 images"]),
    ({"batch_size": 2, "cpus": 4}, ["smaller than the number of devices"]),
    ({"gpus": "0", "cpus": 1}, ["exclude each other"]),
    ({"retrain": True}, ["--model-load-epoch"]),
    ({"model_load_prefix": "other"}, ["--model-load-epoch"]),
    ({"model_prefix": "folder/"}, ["folder/ is a folder"]),
    ({"model_load_epoch": 7, "retrain": True}, ["there is none under"]),
    ({"resume": True, "model_load_epoch": 3}, ["--resume"]),
    ({"lr_steps": "3,9"}, ["never comes"]),
    ({"num_examples": 85}, ["holds 84 images"]),
    ({"num_classes": 2}, ["label 2 is outside the classes"]),
    ({"train_rec": "nowhere.rec"}, ["nowhere.rec is missing"]),
    ({"val_rec": "nowhere.rec"}, ["nowhere.rec is missing", "--val-rec none"]),
    ({"model_load_epoch": 7, "retrain": True}, ["0007"]),
]


@pytest.mark.parametrize(("changes", "fragments"), FLAG_MISTAKES, ids=lambda value: str(value)[:40])
def test_flags_that_cannot_work(train, train_flags, capfd, tmp_path, changes, fragments):
    refuse(train, train_flags(**changes), capfd, *fragments)
    assert not list(tmp_path.rglob("*.params"))


@pytest.mark.parametrize(
    "flags",
    [["--lr", "-1"], ["--lr", "0"], ["--batch-size", "0"], ["--gpus", "0,0"], ["--gpus", "a"], ["--lr-steps", "9,3"],
     ["--drop-out", "1"], ["--epoch", "3"], ["--data-type", "mnist"], ["--mom", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_argparse_refuses(train, train_flags, capfd, flags):
    assert train([*train_flags(), *flags]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_gpu_that_mxnet_cannot_see_names_the_way_out(train, train_flags, capfd):
    refuse(train, train_flags(gpus="0"), capfd, "requirements-cu112.txt", "9.0")


def test_empty_pack(train, train_flags, capfd, tmp_path):
    (tmp_path / "empty.rec").write_bytes(b"")
    refuse(train, train_flags(train_rec=tmp_path / "empty.rec"), capfd, "empty.rec", "empty")


def test_truncated_pack(train, train_flags, capfd, tmp_path):
    write_pack(tmp_path / "cut.rec", [0, 1, 2] * 10)
    truncated(tmp_path / "cut.rec")
    refuse(train, train_flags(train_rec=tmp_path / "cut.rec"), capfd, "cut.rec", "offset")


def test_pack_without_index_is_read_with_a_warning(train, train_flags, caplog, tmp_path):
    write_pack(tmp_path / "plain.rec", [0, 1, 2] * 10)
    (tmp_path / "plain.idx").unlink()
    assert train(train_flags(epochs=1, lr_steps="", train_rec=tmp_path / "plain.rec")) == 0
    assert "plain.idx is missing" in caplog.text
    assert not (tmp_path / "plain.idx").exists()


@pytest.fixture
def pack_with_bad_image(tmp_path):
    """Forty good images and one, record 7, that is none."""
    write_pack(tmp_path / "good.rec", [0, 1, 2] * 13 + [0])
    from data_prep.recordio import RecordFile

    with RecordFile(tmp_path / "good.rec") as good, RecordWriter(tmp_path / "bad.rec") as writer:
        for index in range(len(good)):
            payload = pack(Header(0, 1.0, 7, 0), b"\xff\xd8 no picture") if index == 7 else bytes(good.read(index))
            writer.write(index, payload)
    return tmp_path / "bad.rec"


def test_image_that_does_not_decode(train, train_flags, capfd, pack_with_bad_image):
    refuse(train, train_flags(train_rec=pack_with_bad_image), capfd, "record 7", "offset", "--skip-bad")


def test_skip_bad_counts_and_goes_on(train, train_flags, capfd, pack_with_bad_image):
    assert train(train_flags(epochs=1, lr_steps="", train_rec=pack_with_bad_image, skip_bad=True)) == 0
    assert "1 training images did not decode" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_checkpoint(train, train_flags, capfd, tmp_path, damage):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    params = tmp_path / "model" / "run-0001.params"
    if damage == "truncated":
        truncated(params)
    else:
        data = bytearray(params.read_bytes())
        data[-1] ^= 1
        params.write_bytes(data)
    capfd.readouterr()
    refuse(train, train_flags(model_load_epoch=1, retrain=True), capfd, "run-0001.params")


def test_truncated_checkpoint_of_the_original(train, train_flags, capfd, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    (tmp_path / "model" / "run-0001.json").unlink()
    truncated(tmp_path / "model" / "run-0001.params")
    capfd.readouterr()
    refuse(train, train_flags(model_load_epoch=1, retrain=True), capfd, "run-0001.params")


@pytest.mark.parametrize("retrain", [True, False])
def test_checkpoint_of_another_network(train, train_flags, capfd, tmp_path, retrain):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    capfd.readouterr()
    change = {"depth": 14, "model_load_epoch": 1, "retrain": retrain, "model_prefix": tmp_path / "model" / "other"}
    argv = train_flags(model_load_prefix=tmp_path / "model" / "run", **change)
    refuse(train, argv, capfd, "stage1_unit2_conv1_weight is missing")


def test_fresh_run_does_not_replace_another(train, train_flags, capfd, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    before = (tmp_path / "model" / "run-0001.params").read_bytes()
    capfd.readouterr()
    refuse(train, train_flags(epochs=1, lr_steps="", seed=5), capfd, "--resume", "--overwrite")
    assert train(train_flags(epochs=1, lr_steps="", seed=5, overwrite=True)) == 0
    assert (tmp_path / "model" / "run-0001.params").read_bytes() != before


def test_overwrite_with_another_network(train, train_flags, tmp_path):
    assert train(train_flags(epochs=2, lr_steps="")) == 0
    assert train(train_flags(epochs=1, lr_steps="", depth=14, overwrite=True)) == 0
    assert not (tmp_path / "model" / "run-0002.params").exists()


def test_nothing_left_to_train(train, train_flags, capfd, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    before = read_lines(tmp_path / "log" / "run")
    capfd.readouterr()
    assert train(train_flags(epochs=1, lr_steps="", resume=True)) == 0
    assert "run-0001 has completed 1 epoch and --epochs is 1: nothing is left to train" in capfd.readouterr().err
    assert read_lines(tmp_path / "log" / "run") == before
    flags = train_flags(epochs=1, lr_steps="", model_load_epoch=1, retrain=True)
    refuse(train, flags, capfd, "--epochs is 1; raise it")


def test_log_folder_that_cannot_be_written(train, train_flags, capfd, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refuse(train, train_flags(log_dir=tmp_path / "file" / "log"), capfd, "--log-dir")


def test_no_traceback_in_a_process_of_its_own(train_flags):
    process = start_training(train_flags(depth=21), stderr=-1, text=True)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_presets_have_no_step_after_their_last_epoch():
    for data_type in ("imagenet", "cifar10", "fashion-mnist", "demo"):
        args = parse_args(["--data-type", data_type])
        assert args.lr_steps
        assert max(args.lr_steps) < args.epochs


def test_defaults_of_the_original():
    args = parse_args([])
    assert (args.depth, args.num_group, args.batch_size, args.workspace, args.frequent) == (50, 32, 256, 512, 50)
    assert (args.mom, args.bn_mom, args.wd, args.aug_level, args.kv_store) == (0.9, 0.9, 1e-4, 2, "device")
    assert (args.epochs, args.lr_steps) == (125, (30, 60, 90, 95, 110, 120))
    assert args.model_prefix == "model/se-resnext-imagenet-50-0"


def test_several_labels_train_on_the_first(train, train_flags, tmp_path):
    write_pack(tmp_path / "one.rec", [0, 1, 2] * 10)
    from data_prep.recordio import RecordFile, unpack

    with RecordFile(tmp_path / "one.rec") as one, RecordWriter(tmp_path / "two.rec") as writer:
        for index in range(len(one)):
            header, image = unpack(one.read(index))
            labels = np.array([header.label, 99], np.float32)
            writer.write(index, pack(Header(2, labels, index, 0), bytes(image)))
    assert train(train_flags(epochs=1, lr_steps="", train_rec=tmp_path / "two.rec")) == 0
