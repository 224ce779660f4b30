"""CIFAR-10 from small batches of the same structure: binary and Python archives, folders, hostile pickles."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import cv2
import numpy as np
import pytest

from data_prep import cifar10
from data_prep.recordio import RecordFile
from errors import UsageError

NAMES = [name for names in cifar10.BATCHES.values() for name in names]
COUNT = 6


def batches():
    random = np.random.RandomState(0)
    return {
        name: (random.randint(0, 256, (COUNT, 3072), np.uint8), random.randint(0, 10, COUNT).astype(np.uint8))
        for name in NAMES
    }


def as_binary(images, labels):
    return np.hstack([labels[:, None], images]).astype(np.uint8).tobytes()


def as_python(images, labels):
    """As Python 2 wrote them: protocol 2, keys of bytes."""
    return pickle.dumps({b"batch_label": b"batch", b"labels": labels.tolist(), b"data": images}, protocol=2)


def files_of(kind):
    if kind == "binary":
        return {f"cifar-10-batches-bin/{name}.bin": as_binary(*batch) for name, batch in batches().items()}
    return {f"cifar-10-batches-py/{name}": as_python(*batch) for name, batch in batches().items()}


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def run(source, out):
    return cifar10.main([str(source), "-o", str(out), "--num-thread", "1"])


def check(out):
    expected = batches()
    for pack, names in cifar10.BATCHES.items():
        images = np.concatenate([expected[name][0] for name in names]).reshape(-1, 3, 32, 32)
        with RecordFile(out / f"{pack}.rec") as file:
            np.testing.assert_array_equal(file.labels(), np.concatenate([expected[name][1] for name in names]))
            for number in range(len(file)):
                header, data = file.unpack(number)
                image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                np.testing.assert_array_equal(image[..., ::-1].transpose(2, 0, 1), images[number])
                assert header.id == file.keys[number] == number
    assert (out / "classes.txt").read_text().split()[3] == "cat"


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_archives_and_folders(tmp_path, kind, unpacked):
    source = tmp_path / "source"
    if unpacked:
        for name, data in files_of(kind).items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    else:
        source = write_archive(tmp_path / f"cifar-10-{kind}.tar.gz", files_of(kind))
    assert run(source, tmp_path / "out") == 0
    check(tmp_path / "out")


def damaged(change):
    files = files_of("binary")
    change(files)
    return files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("cifar-10-batches-bin/data_batch_3.bin"), "lacks data_batch_3"),
        (
            lambda files: files.update({"cifar-10-batches-bin/test_batch.bin": bytes(3072)}),
            "test_batch.bin: 3072 bytes are no whole number",
        ),
        (
            lambda files: files.update({"cifar-10-batches-bin/test_batch.bin": b"\x0b" + bytes(3072)}),
            "test_batch.bin: a label outside 0 to 9",
        ),
    ],
)
def test_damaged_batches_are_named(tmp_path, change, message):
    source = write_archive(tmp_path / "a.tar.gz", damaged(change))
    with pytest.raises(UsageError, match=message):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_archives_are_named(tmp_path):
    source = write_archive(tmp_path / "a.tar.gz", files_of("python"))
    source.write_bytes(source.read_bytes()[:-3000])
    with pytest.raises(UsageError, match="a.tar.gz: "):
        run(source, tmp_path / "out")
    with pytest.raises(UsageError, match="b.tar.gz: no such file"):
        run(tmp_path / "b.tar.gz", tmp_path / "out")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile_folder",)


def test_a_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = files_of("python")
    files["cifar-10-batches-py/test_batch"] = pickle.dumps({b"data": Hostile()}, protocol=2)
    with pytest.raises(UsageError, match="test_batch: not a batch of CIFAR-10 .*mkdir has no place"):
        run(write_archive(tmp_path / "a.tar.gz", files), tmp_path / "out")
    assert not (tmp_path / "hostile_folder").exists()
