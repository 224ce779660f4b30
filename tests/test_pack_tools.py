"""verify, stats, cat, split, extract and show on small packs; the commands' help; the ordered parallel map."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_files import encoded, picture, write_tree

from data_prep import __main__ as command
from data_prep import edit, lists_command, show, stats, verify
from data_prep.conversion import Conversion
from data_prep.packing import pack_list
from data_prep.recordio import Header, RecordFile, RecordWriter, pack, unpack
from data_prep.workers import ordered_map
from errors import ProjectError, UsageError, run_command

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["--num-thread", "1"]


@pytest.fixture
def rec(tmp_path):
    tree = write_tree(tmp_path / "images", {"cat": 10, "dog": 20, "eel": 30}, 16, 24)
    assert lists_command.folder_main([str(tree), str(tmp_path / "set"), *QUIET]) == 0
    return tmp_path / "set.rec"


def contents(path):
    with RecordFile(path) as file:
        return [(int(key), bytes(file.read(number))) for number, key in enumerate(file.keys)]


# --- verify ---


@pytest.mark.parametrize("workers", ["1", "2"])
def test_verify_describes_a_good_pack(rec, capsys, workers):
    assert verify.main([str(rec), "--num-thread", workers]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for text in (
        "60 records, 60 whole images", "classes: 3, labels 0 to 2", "images a class: 10 to 30, mean 20.0",
        "fewest: 0 (cat); most: 2 (eel)", "height: 16 to 16", "width: 24 to 24", "formats: JPEG 60", "no problems",
    ):  # fmt: skip
        assert text in output.out


def problems(path, capsys, *options):
    status = verify.main([str(path), *QUIET, *options])
    return status, capsys.readouterr().err


def damage(rec):
    """Damage every kind of thing in eight records; returns the offsets of all 60."""
    with RecordFile(rec) as file:
        offsets = file.offsets.tolist()
    data = bytearray(rec.read_bytes())
    data[offsets[3]] ^= 0xFF  # no magic number
    data[offsets[20] - 150 : offsets[20] - 40] = bytes(110)  # the scan of image 19
    data[offsets[30] + 12 : offsets[30] + 16] = np.float32(3).tobytes()  # a label without a class
    data[offsets[31] + 12 : offsets[31] + 16] = np.float32(0.5).tobytes()
    data[offsets[32] + 12 : offsets[32] + 16] = np.float32(np.nan).tobytes()
    data[offsets[40] + 8 : offsets[40] + 12] = b"\xff\xff\xff\x7f"  # more labels than bytes
    rec.write_bytes(data[: offsets[59] + 30])
    return offsets


def test_verify_names_damage_of_every_kind_and_goes_on(rec, capsys):
    offsets = damage(rec)
    status, errors = problems(rec, capsys)
    assert status == 1
    for text in (
        f"offset {offsets[3]}: no record begins here",
        f"record 18 at offset {offsets[19]}: the JPEG does not decode completely",
        f"at offset {offsets[30]}: label 3 is outside the 3 classes",
        f"at offset {offsets[31]}: label 0.5 is no class number",
        f"at offset {offsets[32]}: a label is no finite number",
        f"at offset {offsets[40]}: the header says 2147483647 labels",
        f"offset {offsets[59]}: the file ends",
        f"set.idx, line 4: no whole record begins at offset {offsets[3]}",
    ):
        assert text in errors
    assert errors.count("problem:") == 8
    # An offset is said once, and the way out is.
    assert errors.count(str(offsets[59])) == 1
    assert verify.main([str(rec), *QUIET]) == 1
    assert f"cat --skip-damaged {rec} -o " in capsys.readouterr().out


def test_cat_saves_what_is_whole(rec, tmp_path, capsys):
    good = [payload for _, payload in contents(rec)]
    damage(rec)
    with pytest.raises(UsageError, match="set.rec"):
        edit.cat_main([str(rec), "-o", str(tmp_path / "all.rec")])
    assert not (tmp_path / "all.rec").exists()
    saved = tmp_path / "whole" / "saved.rec"
    for options in ([], QUIET):
        assert edit.cat_main([str(rec), "-o", str(saved), "--skip-damaged", *options]) == 0
        assert "53 records, 7 left out" in capsys.readouterr().out
        kept = [payload for number, payload in enumerate(good) if number not in (3, 19, 30, 31, 32, 40, 59)]
        assert [payload for _, payload in contents(saved)] == kept
        assert verify.main([str(saved), *QUIET]) == 0
        capsys.readouterr()
    assert edit.cat_main([str(rec), "-o", str(saved), "--skip-damaged", "--num-classes", "2", *QUIET]) == 0
    assert [payload for _, payload in contents(saved)] == [part for part in kept if unpack(part)[0].label < 2]
    rec.write_bytes(bytes(64))
    with pytest.raises(ProjectError, match="holds no whole record"):
        edit.cat_main([str(rec), "-o", str(tmp_path / "none.rec"), "--skip-damaged", *QUIET])
    assert not (tmp_path / "none.rec").exists()


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (0, 3), (2, 0)])
@pytest.mark.parametrize("with_index", [True, False])
def test_cat_finds_records_behind_bytes_lost_or_gained(rec, tmp_path, capsys, lost, gained, with_index):
    good = [payload for _, payload in contents(rec)]
    with RecordFile(rec) as file:
        place = int(file.offsets[7]) + 60
    data = rec.read_bytes()
    rec.write_bytes(data[:place] + b"x" * gained + data[place + lost :])
    if not with_index:
        rec.with_suffix(".idx").unlink()
    assert edit.cat_main([str(rec), "-o", str(tmp_path / "new" / "saved.rec"), "--skip-damaged", *QUIET]) == 0
    # Without an index two places are damaged: the image, and where the record does not end.
    assert f"59 records, {1 if with_index else 2} left out" in capsys.readouterr().out
    assert [payload for _, payload in contents(tmp_path / "new" / "saved.rec")] == good[:7] + good[8:]


def test_cat_counts_what_the_index_misses(rec, tmp_path, capsys):
    with RecordFile(rec) as file:
        place = int(file.offsets[20])
    rec.write_bytes(rec.read_bytes()[: place + 5])
    assert edit.cat_main([str(rec), "-o", str(tmp_path / "new" / "saved.rec"), "--skip-damaged", *QUIET]) == 0
    assert "20 records, 40 left out" in capsys.readouterr().out
    rec.with_suffix(".idx").unlink()
    assert edit.cat_main([str(rec), "-o", str(tmp_path / "new" / "saved.rec"), "--skip-damaged", *QUIET]) == 0
    assert "20 records, 1 left out" in capsys.readouterr().out


def test_records_with_different_numbers_of_labels(tmp_path, capsys):
    for name, label in (("one", 1.0), ("two", [1.0, 2.0])):
        with RecordWriter(tmp_path / f"{name}.rec") as writer:
            for key in range(2):
                writer.write(key, pack(Header(0, label, key), encoded(picture())))
    one, two = (str(tmp_path / f"{name}.rec") for name in ("one", "two"))
    for options in ([], ["--skip-damaged", *QUIET]):
        with pytest.raises(UsageError, match="two.rec: has 2 labels an image where others have 1"):
            edit.cat_main([one, two, "-o", str(tmp_path / "mixed.rec"), *options])
    assert not (tmp_path / "mixed.rec").exists()
    for start in (one, two):
        mixed = tmp_path / "mixed.rec"
        mixed.write_bytes(b"".join(Path(path).read_bytes() for path in (start, one, two)))
        status, errors = problems(mixed, capsys)
        assert status == 1
        assert errors.count("another number of labels") == 2


def test_cat_of_a_face_pack_saves_the_images(tmp_path):
    with RecordWriter(tmp_path / "faces.rec") as writer:
        writer.write(0, pack(Header(2, [2.0, 3.0], 0), b""))
        writer.write(1, pack(Header(0, 5.0, 1), encoded(picture())))
        writer.write(2, pack(Header(2, [1.0, 2.0], 2), b""))
    saved = tmp_path / "saved.rec"
    assert edit.cat(([tmp_path / "faces.rec"]), saved, skip_damaged=True) == (1, 0)
    assert [unpack(payload)[0].label for _, payload in contents(saved)] == [5.0]


def test_a_folder_with_other_classes_is_refused(rec, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "classes.txt").write_text("a\nb\nc\n")
    for main, arguments in (
        (edit.cat_main, [str(rec), "-o", str(other / "x.rec")]),
        (edit.split_main, [str(rec), str(other / "x.rec")]),
        (edit.extract_main, [str(rec), str(other)]),
    ):
        with pytest.raises(UsageError, match="other/classes.txt: names other classes than the packs have"):
            main(arguments)
    assert [path.name for path in other.iterdir()] == ["classes.txt"]


def test_the_way_out_can_be_pasted(rec, tmp_path, capsys):
    folder = tmp_path / "with space"
    folder.mkdir()
    moved = rec.rename(folder / "my set.rec")
    assert verify.main([str(moved), "--num-classes", "2", *QUIET]) == 1
    whole = folder / "my set_whole.rec"
    expected = f"python -m data_prep cat --skip-damaged --num-classes 2 '{moved}' -o '{whole}'"
    assert expected in capsys.readouterr().out


def test_verify_fixes_an_index(rec, capsys):
    index = rec.with_suffix(".idx")
    good = contents(rec)
    lines = index.read_text().splitlines(keepends=True)
    cases = {
        "is missing": None,
        "lacks 2 records, the first at offset": "".join(lines[:-2]),
        "lists 1 records twice": "".join([*lines, lines[0].replace("\t", "9\t")]),
        "keys occur twice": "".join([*lines[:-1], "7\t" + lines[-1].split("\t")[1]]),
        "no whole record begins at offset 8": "".join(["0\t8\n", *lines[1:]]),
        "expected `key TAB offset`": "not an index\n",
        "outside the pack": "".join([*lines, "99\t99999996\n"]),
    }
    for message, text in cases.items():
        index.unlink(missing_ok=True)
        if text is not None:
            index.write_text(text)
        status, errors = problems(rec, capsys)
        assert status == 1
        assert message in errors
        status, errors = problems(rec, capsys, "--fix-index")
        assert (status, errors) == (0, "")
        assert [payload for _, payload in contents(rec)] == [payload for _, payload in good]
        assert sorted(key for key, _ in contents(rec)) == list(range(60))


def test_verify_of_packs_with_several_labels_and_of_face_packs(tmp_path, capsys):
    jpeg = encoded(picture())
    with RecordWriter(tmp_path / "boxes.rec") as writer:
        for key in range(3):
            writer.write(key, pack(Header(0, [0.5, -1, key], key), jpeg))
    assert verify.main([str(tmp_path / "boxes.rec"), *QUIET]) == 0
    assert "labels: 3 an image" in capsys.readouterr().out
    path = tmp_path / "faces.rec"
    with RecordWriter(path) as writer:
        for key in (1, 2, 3):
            writer.write(key, pack(Header(0, float(key // 3), 0), jpeg))
        writer.write(0, pack(Header(2, [4.0, 6.0], 0), b""))
        writer.write(4, pack(Header(2, [1.0, 3.0], 4), b""))
        writer.write(5, pack(Header(2, [3.0, 4.0], 5), b""))
    before = path.with_suffix(".idx").read_text()
    assert verify.main([str(path), *QUIET]) == 0
    assert "3 records without image" in capsys.readouterr().out
    path.with_suffix(".idx").unlink()
    assert verify.main([str(path), "--fix-index", *QUIET]) == 0
    assert path.with_suffix(".idx").read_text() == before
    with RecordFile(path) as file:
        assert file.keys.tolist() == [1, 2, 3]


def test_verify_of_no_pack(tmp_path, capsys):
    with pytest.raises(UsageError, match="no such file"):
        verify.main([str(tmp_path / "a.rec")])
    (tmp_path / "a.rec").write_bytes(b"")
    assert problems(tmp_path / "a.rec", capsys)[0] == 1
    (tmp_path / "a.rec").write_bytes(b"this is no pack of anything at all")
    status, errors = problems(tmp_path / "a.rec", capsys)
    assert status == 1
    assert "offset 0: no record begins here" in errors


# --- stats ---


@pytest.mark.parametrize("workers", [1, 2])
def test_stats_equal_numpy_on_all_pixels(tmp_path, workers):
    random = np.random.RandomState(0)
    images = [random.randint(0, 256, (5 + n, 9, 3)).astype(np.uint8) // (n % 3 + 1) for n in range(70)]
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key, image in enumerate(images):
            writer.write(key, pack(Header(0, 0.0, key), encoded(image, "PNG")))
    mean, std, pixels = stats.channel_stats(tmp_path / "a.rec", workers)
    everything = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    assert pixels == len(everything)
    np.testing.assert_allclose(mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, everything.std(0), rtol=1e-9)


@pytest.mark.parametrize("workers", [1, 2])
def test_stats_name_a_damaged_record(tmp_path, workers):
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key in range(3):
            writer.write(key, pack(Header(0, 0.0, key), encoded(picture())[: -300 if key == 2 else None]))
    with pytest.raises(UsageError, match=r"a.rec: record 2 at offset \d+: the JPEG does not decode"):
        stats.channel_stats(tmp_path / "a.rec", workers)


# --- cat, split, extract ---


def test_split_and_cat(rec, tmp_path):
    outputs = [str(tmp_path / name / "part.rec") for name in ("a", "b")]
    assert edit.split_main([str(rec), *outputs, "--shares", "4", "1"]) == 0
    parts = [contents(path) for path in outputs]
    assert sorted(parts[0] + parts[1]) == sorted(contents(rec))
    with RecordFile(outputs[0]) as large, RecordFile(outputs[1]) as small:
        assert np.bincount(large.labels().astype(int)).tolist() == [8, 16, 24]
        assert np.bincount(small.labels().astype(int)).tolist() == [2, 4, 6]
    before = [Path(path).read_bytes() for path in outputs]
    edit.split_main([str(rec), *outputs, "--shares", "8", "2"])
    assert [Path(path).read_bytes() for path in outputs] == before
    merged = tmp_path / "merged" / "all.rec"
    assert edit.cat_main([*outputs, "-o", str(merged)]) == 0
    assert contents(merged) == [(key, payload) for key, (_, payload) in enumerate(parts[0] + parts[1])]
    assert (merged.parent / "classes.txt").read_text() == "cat\ndog\neel\n"


def test_edits_refuse_what_would_harm(rec, tmp_path):
    with pytest.raises(UsageError, match="is an input"):
        edit.cat_main([str(rec), "-o", str(rec)])
    with pytest.raises(UsageError, match="is an input"):
        edit.split_main([str(rec), str(tmp_path / "a.rec"), str(rec)])
    with pytest.raises(UsageError, match="named twice"):
        edit.split_main([str(rec), str(tmp_path / "a.rec"), str(tmp_path / "a.rec")])
    with pytest.raises(UsageError, match="--shares: 2 numbers"):
        edit.split_main([str(rec), str(tmp_path / "a.rec"), str(tmp_path / "b.rec"), "--shares", "1"])
    other = tmp_path / "other"
    other.mkdir()
    for path in (rec, rec.with_suffix(".idx")):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "classes.txt").write_text("dog\ncat\neel\n")
    with pytest.raises(UsageError, match="classes.txt differ"):
        edit.cat_main([str(rec), str(other / "set.rec"), "-o", str(tmp_path / "out.rec")])


def test_extracted_images_can_be_packed_again(rec, tmp_path):
    folder = tmp_path / "files"
    assert edit.extract_main([str(rec), str(folder)]) == 0
    assert len(list((folder / "eel").glob("*.jpg"))) == 30
    pack_list(folder / "set.lst", folder, Conversion(pass_through=True))
    assert (folder / "set.rec").read_bytes() == rec.read_bytes()
    assert (folder / "set.idx").read_bytes() == rec.with_suffix(".idx").read_bytes()


def test_class_names_do_not_leave_the_folder(tmp_path):
    names = ["../../evil", "T-shirt/top", "..", ""]
    assert [edit._class_folder(float(label), names) for label in range(5)] == [
        "_.._evil", "T-shirt_top", "_", "_", "4",
    ]  # fmt: skip
    assert edit._class_folder(float("nan"), names) == "nan"


# --- show ---


def test_show_draws_the_samples(rec, tmp_path):
    out = tmp_path / "grid.png"
    assert show.main([str(rec), "-o", str(out), "--grid", "2x3", "--cell", "48", "--first"]) == 0
    grid = cv2.imread(str(out))[..., ::-1]
    assert grid.shape == (2 * 68 + 4, 3 * 52 + 4, 3)
    with RecordFile(rec) as file:
        for number in range(6):
            image = cv2.imdecode(np.frombuffer(file.unpack(number)[1], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            top, left = 4 + number // 3 * 68 + 8, 4 + number % 3 * 52
            np.testing.assert_array_equal(grid[top : top + 32, left : left + 48][::2, ::2], image)
            below = grid[top + 40 : top + 56, left : left + 48]
            assert (below < 128).any()


def test_show_after_augmentation(rec, tmp_path):
    outputs = [tmp_path / f"{number}.png" for number in range(3)]
    options = ["--grid", "1x4", "--cell", "16", "--augment", "--image-size", "16", "--aug-level", "3", "--seed"]
    for path, seed in zip(outputs, "001"):
        assert show.main([str(rec), "-o", str(path), *options, seed]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert outputs[0].read_bytes() != outputs[2].read_bytes()


def test_show_options_that_cannot_work(rec, tmp_path):
    for options, message in (
        (["--grid", "8"], "--grid 8: expected"),
        (["--grid", "0x3"], "--grid 0x3"),
        (["-o", "grid.xyz"], "must end in"),
    ):
        with pytest.raises(UsageError, match=message):
            show.main([str(rec), *options])


# --- the command line and the workers ---


def test_every_command_explains_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_prep", "--help"])
    assert run_command(command.main) == 0
    overview = capsys.readouterr().out
    for name in command.COMMANDS:
        assert name in overview
        monkeypatch.setattr(sys, "argv", ["data_prep", name, "--help"])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 0
        assert f"data_prep {name}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["data_prep", "nonsense"])
    assert run_command(command.main) == 2
    assert "no command 'nonsense'; there are list, im2rec" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_imports_nothing_heavy(name):
    code = f"import sys; sys.argv = ['data_prep', {name!r}, '--help']\nfrom data_prep.__main__ import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nprint('modules', *sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = output.rsplit("modules ", 1)[1].split()
    assert not {"mxnet", "torch", "matplotlib", "tqdm"} & set(modules)
    assert name == "show" or "cv2" not in modules


def _slow_square(number):
    time.sleep(0.02 * (number % 3))
    return number * number


def _fail_at_seven(number):
    if number == 7:
        raise UsageError("seven is refused")
    return number


def _divide(number):
    return 1 // (number - 3)


def _die_at_five(number):
    if number == 5:
        os._exit(9)
    return number


def test_ordered_map_keeps_the_order_and_takes_no_more_than_it_needs():
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    results = ordered_map(_slow_square, tasks(), 3)
    assert [next(results) for _ in range(30)] == [number * number for number in range(30)]
    assert len(taken) < 60
    results.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_fail_at_seven, "seven is refused"),
        (_divide, "a worker process failed: ZeroDivisionError"),
        (_die_at_five, r"a worker process ended unexpectedly \(exit status 9\)"),
    ],
)
def test_failures_of_workers_reach_the_caller(function, message):
    with pytest.raises(ProjectError, match=message):
        list(ordered_map(function, range(20), 2))
