"""The embedded data set, and the command that makes it."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import fashion_mnist
from data_prep.fashion_mnist import CLASSES, DEBIAN_FOLDER, DEMO_IMAGES, FILES
from data_prep.png import encode_png
from data_prep.recordio import RecordFile
from errors import UsageError

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"


def decoded(record_bytes, flags=cv2.IMREAD_UNCHANGED):
    return cv2.imdecode(np.frombuffer(record_bytes, np.uint8), flags)


def pictures_of(path):
    with RecordFile(path) as file:
        records = [file.unpack(number) for number in range(len(file))]
    return np.stack([decoded(image) for _, image in records]), records


@pytest.mark.parametrize("name", FILES)
def test_the_embedded_packs_are_complete(name):
    with RecordFile(DEMO / f"{name}.rec") as file:
        labels = file.labels()
        assert labels.dtype == np.float32
        assert np.bincount(labels.astype(int)).tolist() == [DEMO_IMAGES[name]] * 10
        assert file.keys.tolist() == list(range(len(labels)))
        ids = [file.header(number).id for number in range(len(labels))]
        image = file.unpack(0)[1]
    assert len(set(ids)) == len(ids)
    # Shuffled: no class lies in one stretch.
    assert np.abs(np.diff(labels)).mean() > 2
    assert decoded(image).shape == (28, 28)
    colours = decoded(image, cv2.IMREAD_COLOR)
    assert colours.shape == (28, 28, 3)
    assert (colours == colours[..., :1]).all()


def test_the_embedded_packs_are_small_and_licensed():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 6_000_000
    assert "Copyright (c) 2017 Zalando SE" in (DEMO / "LICENSE").read_text()
    assert (DEMO / "classes.txt").read_text().splitlines() == list(CLASSES)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("name", FILES)
def test_the_embedded_packs_hold_what_the_documented_selection_says(name):
    images, labels = (fashion_mnist.read_source(DEBIAN_FOLDER, file) for file in FILES[name])
    selection = fashion_mnist.demo_selection(labels, DEMO_IMAGES[name])
    packed, records = pictures_of(DEMO / f"{name}.rec")
    np.testing.assert_array_equal(packed, images[selection])
    np.testing.assert_array_equal([header.label for header, _ in records], labels[selection])
    assert [header.id for header, _ in records] == selection.tolist()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The four files in miniature: 40 training and 20 test pictures."""
    generator = np.random.RandomState(0)
    for count, (image_file, label_file) in zip((40, 20), FILES.values()):
        images = generator.randint(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in ((image_file, images), (label_file, labels)):
            shape = struct.pack(f">{values.ndim}I", *values.shape)
            data = bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
            monkeypatch.setitem(fashion_mnist.CHECKSUMS, name, hashlib.sha256(data).hexdigest())
    return tmp_path


def test_the_full_set_from_a_folder(source, tmp_path):
    assert fashion_mnist.main(["--source", str(source), "-o", str(tmp_path / "out")]) == 0
    for name, (image_file, label_file) in FILES.items():
        packed, records = pictures_of(tmp_path / "out" / f"{name}.rec")
        np.testing.assert_array_equal(packed, fashion_mnist.read_source(source, image_file))
        labels = fashion_mnist.read_source(source, label_file)
        assert [header.label for header, _ in records] == labels.tolist()
        assert [header.id for header, _ in records] == list(range(len(labels)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.rec", "train.idx", "val.rec", "val.idx", "classes.txt", "LICENSE",
    }  # fmt: skip


def test_making_it_twice_gives_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEMO_IMAGES", {"train": 3, "val": 1})
    for folder in ("one", "two"):
        assert fashion_mnist.main(["--demo", "--source", str(source), "-o", str(tmp_path / folder)]) == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with RecordFile(tmp_path / "one" / "train.rec") as file:
        assert sorted(file.header(number).id for number in range(len(file))) == list(range(30))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "train-labels-idx1-ubyte.gz: no such file; the four original files"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-12]),
            "train-labels-idx1-ubyte.gz: cannot be read",
        ),
        (lambda path: path.write_bytes(b"no gzip"), "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x01")), "not the original file"),
    ],
)
def test_bad_sources_are_named(source, tmp_path, damage, message):
    damage(source / "train-labels-idx1-ubyte.gz")
    with pytest.raises(UsageError, match=message):
        fashion_mnist.main(["--source", str(source), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "train.rec").exists()
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        fashion_mnist.main(["--source", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("data", [b"", b"\0\0\x08", b"\0\0\x09\x01\0\0\0\x01x", b"\0\0\x08\x02\0\0\0\x02\0\0\0\x02abc"])
def test_files_that_are_no_idx_are_refused(data):
    with pytest.raises(UsageError, match="name: "):
        fashion_mnist.read_idx(data, "name")


@pytest.mark.parametrize("shape", [(1, 1), (28, 28), (5, 70), (32, 32, 3), (3, 200, 3)])
@pytest.mark.parametrize("kind", ["noise", "ramp", "flat"])
def test_png_keeps_every_pixel(shape, kind):
    image = np.full(shape, 9, np.uint8)
    if kind == "noise":
        image = np.random.RandomState(0).randint(0, 256, shape, np.uint8)
    elif kind == "ramp":
        image.T[:] = np.add.outer(np.arange(shape[1]), np.arange(shape[0]))
    result = decoded(encode_png(image))
    np.testing.assert_array_equal(result[..., ::-1] if image.ndim == 3 else result, image)
