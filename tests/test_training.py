"""The training command end to end, with real MXNet and real packs: learning, continuing, finetuning, mistakes."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import TINY_CLASSES, TINY_IMAGES, read_lines, without_times, write_pack
from graph.params_file import read_arrays
from mxnet_compat import mx


def files_equal(left, right) -> bool:
    return left.read_bytes() == right.read_bytes()


def test_learns_and_leaves_files_that_mxnet_reads(train, train_flags, tmp_path):
    assert train(train_flags()) == 0
    lines = read_lines(tmp_path / "log" / "run")
    epochs = [line for line in lines if line["type"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert epochs[-1]["train"]["loss"] < epochs[0]["train"]["loss"] / 2
    assert epochs[-1]["validation"]["top1"] > 0.9
    assert epochs[-1]["images"] == 3 * TINY_IMAGES
    header = lines[0]
    assert (header["classes"], header["train_images"], header["steps_per_epoch"]) == (TINY_CLASSES, TINY_IMAGES, 6)
    symbol, arg_params, aux_params = mx.model.load_checkpoint(str(tmp_path / "model" / "run"), 3)
    assert set(arg_params) == set(symbol.list_arguments()) - {"data", "softmax_label"}
    assert set(aux_params) == set(symbol.list_auxiliary_states())


def test_every_image_counts_once_and_padding_nowhere(train, train_flags, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    windows = [line for line in read_lines(tmp_path / "log" / "run") if line["type"] == "train"]
    assert windows[-1]["images"] == TINY_IMAGES
    assert [line["batch"] for line in windows] == [2, 4, 6]


def test_retrain_equals_a_straight_run(train, train_flags, tmp_path):
    assert train(train_flags("straight", epochs=4, drop_out=0.3)) == 0
    assert train(train_flags("parts", epochs=2, lr_steps="", drop_out=0.3)) == 0
    # No --lr: the schedule goes on as if it had never stopped.
    assert train(train_flags("parts", epochs=4, lr=None, drop_out=0.3, model_load_epoch=2, retrain=True)) == 0
    model = tmp_path / "model"
    for extension in ("params", "states"):
        assert files_equal(model / f"straight-0004.{extension}", model / f"parts-0004.{extension}")
    straight, parts = (read_lines(tmp_path / "log" / name) for name in ("straight", "parts"))
    assert without_times(straight) == without_times(parts)
    assert {round(line["lr"], 6) for line in straight if line["type"] == "train"} == {0.02, 0.002}


def test_resume_inside_an_epoch_equals_a_straight_run(train, train_flags, tmp_path, tiny_data):
    assert train(train_flags("straight", save_every=4)) == 0
    assert train(train_flags("parts", save_every=4, epochs=1, lr_steps="")) == 0
    model = tmp_path / "model"
    # What a run killed in epoch 1 would have left: only the checkpoint inside it.
    for path in [*model.glob("parts-0001.*"), *model.glob("parts-best.*")]:
        path.unlink()
    assert train(train_flags("parts", save_every=4, resume=True)) == 0
    for extension in ("params", "states"):
        assert files_equal(model / f"straight-0003.{extension}", model / f"parts-0003.{extension}")
    assert without_times(read_lines(tmp_path / "log" / "straight")) == without_times(
        read_lines(tmp_path / "log" / "parts")
    )


def test_explicit_rate_holds_from_there_on(train, train_flags, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    assert train(train_flags(epochs=3, lr=0.001, lr_steps="2", model_load_epoch=1, retrain=True)) == 0
    rates = [(line["epoch"], line["lr"]) for line in read_lines(tmp_path / "log" / "run") if line["type"] == "epoch"]
    assert rates == [(1, 0.02), (2, 0.001), (3, pytest.approx(0.0001))]


def test_resume_with_the_same_command_continues_the_schedule(train, train_flags, tmp_path):
    for epochs in (1, 2, 3):
        # The rate falls after epoch 1; the same --lr on the command line must not raise it again.
        assert train(train_flags(epochs=epochs, lr=0.02, lr_steps="1" if epochs > 1 else "", resume=True)) == 0
    rates = [line["lr"] for line in read_lines(tmp_path / "log" / "run") if line["type"] == "epoch"]
    assert rates == [0.02, pytest.approx(0.002), pytest.approx(0.002)]


def test_resume_with_another_rate_takes_it_from_there_on(train, train_flags, tmp_path):
    for epochs, rate in ((1, 0.02), (2, 0.005), (3, 0.005)):
        assert train(train_flags(epochs=epochs, lr=rate, lr_steps="2" if epochs == 3 else "", resume=True)) == 0
    rates = [line["lr"] for line in read_lines(tmp_path / "log" / "run") if line["type"] == "epoch"]
    assert rates == [0.02, 0.005, pytest.approx(0.0005)]


def test_resume_with_another_batch_size_keeps_the_log(train, train_flags, tmp_path, capfd):
    assert train(train_flags(epochs=2, lr_steps="")) == 0
    assert train(train_flags(epochs=3, lr_steps="", batch_size=42, seed=3, resume=True)) == 0
    lines = read_lines(tmp_path / "log" / "run")
    assert [line["epoch"] for line in lines if line["type"] == "epoch"] == [1, 2, 3]
    assert "changed since run-0002: --batch-size" in capfd.readouterr().err


def test_resume_without_checkpoint_starts_from_scratch_and_says_so(train, train_flags, capfd):
    assert train(train_flags(epochs=1, lr_steps="", resume=True)) == 0
    assert "starting from scratch" in capfd.readouterr().err


def test_original_checkpoint_continues_with_fresh_momentum(train, train_flags, tmp_path, capfd):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    for extension in ("json", "states"):
        (tmp_path / "model" / f"run-0001.{extension}").unlink()
    assert train(train_flags(epochs=2, lr_steps="", model_load_epoch=1, retrain=True)) == 0
    assert "fresh state" in capfd.readouterr().err


def test_finetune_reinitialises_the_classifier_alone(train, train_flags, tmp_path, capfd):
    assert train(train_flags("base", epochs=1, lr_steps="")) == 0
    write_pack(tmp_path / "five.rec", [i % 5 for i in range(40)])
    finetune = {"model_load_prefix": tmp_path / "model" / "base", "model_load_epoch": 1, "lr": 1e-12}
    argv = train_flags("five", epochs=1, lr_steps="", train_rec=tmp_path / "five.rec", val_rec="none", **finetune)
    assert train(argv) == 0
    assert "fc1_weight is initialised anew" in capfd.readouterr().err
    base = read_arrays(tmp_path / "model" / "base-0001.params")
    five = read_arrays(tmp_path / "model" / "five-0001.params")
    assert five["arg:fc1_weight"].shape == (5, base["arg:fc1_weight"].shape[1])
    # The rate is too small to move a weight.
    np.testing.assert_allclose(five["arg:conv0_weight"], base["arg:conv0_weight"], rtol=1e-5)


def test_finetune_from_its_own_prefix_leaves_the_source_alone(train, train_flags, tmp_path):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    before = (tmp_path / "model" / "run-0001.params").read_bytes()
    assert train(train_flags(epochs=1, lr_steps="", model_load_epoch=1)) == 0
    assert (tmp_path / "model" / "run-0001.params").read_bytes() == before
    assert (tmp_path / "model" / "run-finetuned-0001.params").exists()


def test_several_contexts_resume_exactly(train, train_flags, tmp_path):
    assert train(train_flags("straight", epochs=2, lr_steps="", cpus=2)) == 0
    assert train(train_flags("parts", epochs=1, lr_steps="", cpus=2)) == 0
    assert train(train_flags("parts", epochs=2, lr_steps="", cpus=2, resume=True)) == 0
    model = tmp_path / "model"
    for extension in ("params", "states"):
        assert files_equal(model / f"straight-0002.{extension}", model / f"parts-0002.{extension}")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_other_optimizers_resume_exactly(train, train_flags, tmp_path, optimizer):
    change = {"optimizer": optimizer, "lr": 0.001, "lr_steps": ""}
    assert train(train_flags("straight", epochs=2, **change)) == 0
    assert train(train_flags("parts", epochs=1, **change)) == 0
    assert train(train_flags("parts", epochs=2, resume=True, **change)) == 0
    model = tmp_path / "model"
    for extension in ("params", "states"):
        assert files_equal(model / f"straight-0002.{extension}", model / f"parts-0002.{extension}")


def test_diverged_loss_stops_and_names_the_batch(train, train_flags, tmp_path, capfd):
    assert train(train_flags(epochs=1, lr_steps="")) == 0
    assert train(train_flags(epochs=3, lr=1e30, lr_steps="", model_load_epoch=1, retrain=True)) == 1
    message = capfd.readouterr().err
    assert "epoch 2, batch" in message
    assert "loss became" in message
    assert not (tmp_path / "model" / "run-0002.params").exists()
    assert (tmp_path / "model" / "run-0001.params").exists()
