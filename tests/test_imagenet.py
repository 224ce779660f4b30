"""ImageNet from small tar files of the same structure, and from folders; archives that are damaged."""

from __future__ import annotations

import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from image_files import encoded, picture

from data_prep import imagenet
from data_prep.archives import tar_members
from data_prep.lists import read_list
from data_prep.recordio import RecordFile
from data_prep.sources import parse_stretch, read_source
from errors import UsageError

SYNSETS = ["n01440764", "n01443537", "n02105855"]
PER_CLASS = 4
QUIET = ["--num-thread", "1"]


def tar_bytes(files: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return buffer.getvalue()


def train_files() -> dict[str, dict[str, bytes]]:
    """Synset -> file name -> bytes; as in the original, one of the .JPEG files is a PNG."""
    files = {}
    for label, synset in enumerate(SYNSETS):
        pictures = [picture(30 + label, 40, 10 * label + number) for number in range(PER_CLASS)]
        files[synset] = {f"{synset}_{7 * number}.JPEG": encoded(image) for number, image in enumerate(pictures)}
    files[SYNSETS[2]][f"{SYNSETS[2]}_0.JPEG"] = encoded(picture(32, 40, 20), "PNG")
    return files


def val_files() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{n + 1:08d}.JPEG": encoded(picture(50 + n, 60, 90 + n)) for n in range(6)}


VAL_LABELS = [2, 0, 1, 1, 0, 2]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    # The order inside the archive is not that of the labels.
    inner = {f"{synset}.tar": tar_bytes(files) for synset, files in reversed(list(train_files().items()))}
    (folder / imagenet.TRAIN_TAR).write_bytes(tar_bytes(inner))
    (folder / imagenet.VAL_TAR).write_bytes(tar_bytes(val_files()))
    lines = [f"val/ILSVRC2012_val_{n + 1:08d}.jpeg {label}\n" for n, label in enumerate(VAL_LABELS)]
    (folder / "val_list.txt").write_text("".join(lines))
    return folder


def packed(path):
    """{name of the image: (label, height)} by the list, in the order of the pack."""
    items = list(read_list(path.with_suffix(".lst")))
    with RecordFile(path) as file:
        assert file.keys.tolist() == [item.key for item in items]
        labels = file.labels()
        images = [bytes(file.unpack(number)[1]) for number in range(len(file))]
    names = [(parse_stretch(item.path).name if parse_stretch(item.path) else item.path) for item in items]
    return {name.rsplit("/", 1)[-1]: (label, image) for name, label, image in zip(names, labels, images)}


def check_train(folder, classes=SYNSETS):
    found = packed(folder / "train.rec")
    assert len(found) == PER_CLASS * len(SYNSETS)
    for synset, files in train_files().items():
        for name, data in files.items():
            label, image = found[name]
            assert label == classes.index(synset)
            assert image == data or data.startswith(b"\x89PNG")
    assert list(found) != sorted(found)
    assert (folder / "classes.txt").read_text().split() == classes


def check_val(folder):
    found = packed(folder / "val.rec")
    assert list(found) == sorted(val_files())
    assert [label for label, _ in found.values()] == VAL_LABELS
    assert [image for _, image in found.values()] == list(val_files().values())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_from_the_tar_files(source, tmp_path, workers):
    out = tmp_path / "out"
    assert imagenet.main([str(source), "-o", str(out), "--num-thread", workers]) == 0
    check_train(out)
    check_val(out)
    # Nothing but lists, packs and what belongs to them is written anywhere.
    assert {path.name for path in out.iterdir()} == {"classes.txt"} | {
        f"{part}.{ending}" for part in ("train", "val") for ending in ("lst", "rec", "idx", "pack.json")
    }
    assert len(list(source.iterdir())) == 3


def test_from_folders(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for synset, files in train_files().items():
        (source / "train" / synset).mkdir(parents=True)
        for name, data in files.items():
            (source / "train" / synset / name).write_bytes(data)
    (source / "val").mkdir()
    for name, data in val_files().items():
        (source / "val" / name).write_bytes(data)
    # Labels as synsets, one a line, in the order of the names.
    (tmp_path / "labels.txt").write_text("".join(f"{SYNSETS[label]}\n" for label in VAL_LABELS))
    assert imagenet.main([str(source), "-o", str(out), "--val-list", str(tmp_path / "labels.txt"), *QUIET]) == 0
    check_train(out)
    check_val(out)


def test_from_a_folder_of_class_archives_and_a_sorted_validation_set(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "train").mkdir(parents=True)
    for synset, files in train_files().items():
        (source / "train" / f"{synset}.tar").write_bytes(tar_bytes(files, tarfile.GNU_FORMAT))
    for (name, data), label in zip(val_files().items(), VAL_LABELS):
        (source / "val" / SYNSETS[label]).mkdir(parents=True, exist_ok=True)
        (source / "val" / SYNSETS[label] / name).write_bytes(data)
    assert imagenet.main([str(source), "-o", str(out), *QUIET]) == 0
    check_train(out)
    found = packed(out / "val.rec")
    assert {name: label for name, (label, _) in found.items()} == dict(zip(val_files(), VAL_LABELS))


def test_a_synset_list_decides_the_labels(source, tmp_path):
    order = [SYNSETS[1], SYNSETS[2], SYNSETS[0]]
    (source / "synsets.txt").write_text("".join(f"{synset} some words\n" for synset in order))
    assert imagenet.main([str(source), "-o", str(tmp_path / "out"), "--parts", "train", *QUIET]) == 0
    check_train(tmp_path / "out", order)
    (source / "synsets.txt").write_text(f"{SYNSETS[0]}\n{SYNSETS[1]}\n")
    with pytest.raises(UsageError, match="class n02105855 is not in the synset list"):
        imagenet.main([str(source), "-o", str(tmp_path / "out"), *QUIET])


def test_resume_uses_what_is_finished(source, tmp_path):
    out = str(tmp_path / "out")
    imagenet.main([str(source), "-o", out, "--parts", "train", *QUIET])
    (source / imagenet.TRAIN_TAR).unlink()
    (source / "synsets.txt").write_text("\n".join(SYNSETS))
    assert imagenet.main([str(source), "-o", out, "--resume", *QUIET]) == 0
    check_train(tmp_path / "out")
    check_val(tmp_path / "out")


def test_images_damaged_inside_the_archive_are_left_out(source, tmp_path):
    path = source / imagenet.VAL_TAR
    data = val_files()
    second = list(data)[1]
    data[second] = data[second][:-200] + bytes(200)
    path.write_bytes(tar_bytes(data))
    assert imagenet.main([str(source), "-o", str(tmp_path / "out"), "--parts", "val", *QUIET]) == 1
    assert len(packed_names(tmp_path / "out" / "val.rec")) == 5
    assert f"::{second}\t" in (tmp_path / "out" / "val.rejected.tsv").read_text()


def packed_names(path):
    with RecordFile(path) as file:
        return file.keys.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: (source / imagenet.TRAIN_TAR).unlink(), "holds neither ILSVRC2012_img_train.tar nor"),
        (lambda source: (source / imagenet.VAL_TAR).unlink(), "holds neither ILSVRC2012_img_val.tar nor"),
        (lambda source: (source / "val_list.txt").unlink(), "the validation images need labels"),
        (lambda source: (source / "val_list.txt").write_text("a 1\n"), "no label for ilsvrc2012_val_00000001 and 5"),
        (lambda source: (source / "val_list.txt").write_text("1\n2\n"), "2 labels for 6 validation images"),
        (lambda source: (source / "val_list.txt").write_text("a 3\n"), "line 1: expected .* a label below 3"),
        (lambda source: (source / imagenet.VAL_TAR).write_bytes(b"x" * 2000), "img_val.tar: not an uncompressed tar"),
        (lambda source: cut(source / imagenet.TRAIN_TAR, 0.5), "img_train.tar.*cut off"),
        (lambda source: cut(source / imagenet.VAL_TAR, 0.4), "img_val.tar.*cut off"),
    ],
)
def test_missing_and_damaged_sources_are_named(source, tmp_path, change, message):
    change(source)
    with pytest.raises(UsageError, match=message):
        imagenet.main([str(source), "-o", str(tmp_path / "out"), *QUIET])


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_all_kinds_of_tar_files(tmp_path, kind):
    names = ["a.jpg", "d/b.jpg"] if kind == tarfile.USTAR_FORMAT else ["a.jpg", "long" * 60 + ".jpg", "ü.jpg"]
    files = {name: np.random.RandomState(len(name)).bytes(1000 + len(name)) for name in names}
    outer = tmp_path / "outer.tar"
    outer.write_bytes(tar_bytes({"inner.tar": tar_bytes(files, kind)}))
    (inner,) = tar_members(outer)
    found = list(tar_members(outer, "outer.tar", inner))
    assert [member.name for member in found] == names
    assert [read_source(str(tmp_path), str(member)) for member in found] == list(files.values())


@pytest.mark.parametrize("cut_at", range(512, 10240, 512))
def test_an_archive_that_is_cut_anywhere_is_noticed(tmp_path, cut_at):
    path = tmp_path / "a.tar"
    whole = tar_bytes({f"{number}.jpg": bytes(700) for number in range(4)})
    # Two blocks of zeros end an archive after its members; what follows only fills it up.
    assert len(whole) == 10240
    path.write_bytes(whole[:cut_at])
    if cut_at > 4 * 3 * 512:
        assert len(list(tar_members(path))) == 4
    else:
        with pytest.raises(UsageError, match="a.tar: "):
            list(tar_members(path))


def test_memory_does_not_grow_with_the_archive(tmp_path):
    path = tmp_path / "many.tar"
    peaks = []
    for count in (2000, 8000):
        path.write_bytes(tar_bytes({f"{number:06d}.jpg": b"x" for number in range(count)}))
        tracemalloc.start()
        assert sum(1 for _ in tar_members(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 500_000
