"""Lists and packing: order, conversions, rejected images, interruption and resumption, the tool's options."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from image_files import encoded, picture, rotated, write_tree
from PIL import Image

from data_prep import im2rec, lists_command, packing
from data_prep.conversion import Conversion
from data_prep.decode import DecodeError
from data_prep.images import convert, jpeg_reaches_its_end
from data_prep.lists import read_list
from data_prep.packing import pack_list
from data_prep.planes import Planes
from data_prep.recordio import RecordFile
from data_prep.turbojpeg import has_library, load_library
from errors import ProjectError, UsageError, run_command

ROOT = Path(__file__).resolve().parent.parent


def records(path):
    with RecordFile(path) as file:
        return [file.unpack(number) for number in range(len(file))]


def images_of(path):
    return [cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for _, image in records(path)]


def write_list(path, names, labels=None):
    labels = labels or [[0.0]] * len(names)
    rows = zip(range(len(names)), labels, names)
    path.write_text("".join(f"{key}\t" + "\t".join(map(str, label)) + f"\t{name}\n" for key, label, name in rows))
    return path


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images", {"cat": 5, "dog": 4, "eel": 3})


# --- lists ---


def mxnet_tool():
    import importlib.util

    package = importlib.util.find_spec("mxnet")
    return Path(package.origin).parent / "tools" / "im2rec.py" if package else None


def test_lists_equal_those_of_the_tool_but_for_the_order(tree, tmp_path):
    import runpy

    from mxnet_compat import mx  # noqa: F401 - its shim must be in place before the tool imports mxnet

    if not mxnet_tool().exists():
        pytest.skip("this build of MXNet comes without its tools")
    options = ["--list", "--recursive", "--train-ratio", "0.5", "--test-ratio", "0.25", "--chunks", "2"]
    assert im2rec.main([*options, str(tmp_path / "ours"), str(tree)]) == 0
    arguments, path = sys.argv, list(sys.path)
    try:
        sys.argv = ["im2rec.py", *options, str(tmp_path / "theirs"), str(tree)]
        runpy.run_path(str(mxnet_tool()), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = arguments, path
    ours = sorted(tmp_path.glob("ours_*.lst"))
    theirs = sorted(tmp_path.glob("theirs_*.lst"))
    assert [path.name[5:] for path in ours] == [path.name[7:] for path in theirs]
    all_ours, all_theirs = (
        sorted("".join(path.read_text() for path in paths).splitlines()) for paths in (ours, theirs)
    )
    assert all_ours == all_theirs
    assert len(all_ours) == 12
    assert (tmp_path / "classes.txt").read_text().split() == ["cat", "dog", "eel"]


def test_lists_never_change_for_the_same_input(tree, tmp_path):
    assert im2rec.main(["--list", "--recursive", str(tmp_path / "a"), str(tree)]) == 0
    keys = [item.key for item in read_list(tmp_path / "a.lst")]
    # The permutation of numpy's frozen RandomState(100): if this changes, splits of existing sets change.
    assert keys == [9, 6, 1, 5, 4, 2, 0, 10, 7, 3, 11, 8]
    im2rec.main(["--list", "--recursive", "--seed", "1", str(tmp_path / "b"), str(tree)])
    assert [item.key for item in read_list(tmp_path / "b.lst")] != keys
    im2rec.main(["--list", "--recursive", "--no-shuffle", str(tmp_path / "c"), str(tree)])
    assert [item.key for item in read_list(tmp_path / "c.lst")] == list(range(12))


def test_hidden_files_are_no_images(tree, tmp_path):
    (tree / "cat" / "._000.jpg").write_bytes(b"a resource fork of macOS")
    (tree / ".thumbnails").mkdir()
    (tree / ".thumbnails" / "000.jpg").write_bytes((tree / "cat" / "000.jpg").read_bytes())
    for options, folder, count in ((["--recursive"], tree, 12), ([], tree / "cat", len(list(tree.glob("cat/[!.]*"))))):
        im2rec.main(["--list", *options, str(tmp_path / "a"), str(folder)])
        paths = [item.path for item in read_list(tmp_path / "a.lst")]
        assert len(paths) == count
        assert not [path for path in paths if "/." in f"/{path}"]


def test_lists_from_text_files_and_tables(tree, tmp_path):
    text = tmp_path / "train_list.txt"
    text.write_text("cat/000.jpg 2\ndog/001.jpg 0\n\ncat/with space.jpg 1\n")
    prefix = str(tmp_path / "out" / "text")
    assert lists_command.main([str(tree), prefix, "--from", str(text), "--no-shuffle"]) == 0
    assert list(read_list(Path(prefix + ".lst"))) == [
        (0, (2.0,), "cat/000.jpg"),
        (1, (0.0,), "dog/001.jpg"),
        (2, (1.0,), "cat/with space.jpg"),
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\ufeffimage,class\ncat/001,kitten\neel/000.jpg,fish\ncat/000.jpg,kitten\n", encoding="utf-8")
    prefix = str(tmp_path / "out" / "table")
    assert lists_command.main([str(tree), prefix, "--from", str(table), "--no-shuffle"]) == 0
    found = [(item.labels, item.path) for item in read_list(Path(prefix + ".lst"))]
    assert found == [((1.0,), "cat/001.jpg"), ((0.0,), "eel/000.jpg"), ((1.0,), "cat/000.jpg")]
    assert (tmp_path / "out" / "classes.txt").read_text() == "fish\nkitten\n"
    table.write_text("cat/000.jpg,1,2.5\ncat/001.jpg,3,4\n")
    assert lists_command.main([str(tree), prefix, "--from", str(table), "--no-shuffle"]) == 0
    assert [item.labels for item in read_list(Path(prefix + ".lst"))] == [(1.0, 2.5), (3.0, 4.0)]


def test_classes_can_be_given(tree, tmp_path):
    (tmp_path / "names.txt").write_text("eel\ndog\ncat\nfox\n")
    prefix = str(tmp_path / "out" / "set")
    options = ["--classes", str(tmp_path / "names.txt"), "--no-shuffle"]
    assert lists_command.main([str(tree), prefix, *options]) == 0
    assert [item.labels[0] for item in read_list(Path(prefix + ".lst"))] == [2.0] * 5 + [1.0] * 4 + [0.0] * 3
    (tmp_path / "names.txt").write_text("eel\ncat\n")
    with pytest.raises(UsageError, match="dog: no such class among the 2"):
        lists_command.main([str(tree), prefix, *options])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no images"),
        ("0\t1\ta.jpg\nnonsense\n", "line 2: expected `index TAB"),
        ("0\ta.jpg\n", "line 1: expected"),
        ("x\t1\ta.jpg\n", "line 1: expected"),
        ("0\tone\ta.jpg\n", "line 1: expected"),
        ("0\t1\ta.jpg\n0\t1\tb.jpg\n", "index 0 occurs 2 times"),
    ],
)
def test_bad_lists_are_named(tmp_path, text, message):
    (tmp_path / "a.lst").write_text(text)
    with pytest.raises(UsageError, match=f"a.lst.*{message}"):
        pack_list(tmp_path / "a.lst", tmp_path, Conversion())
    assert [path.name for path in tmp_path.iterdir()] == ["a.lst"]


def test_empty_list_is_refused(tmp_path):
    (tmp_path / "a.lst").touch()
    with pytest.raises(UsageError, match=r"a\.lst: holds no images"):
        im2rec.main([str(tmp_path / "a"), str(tmp_path)])


def test_missing_sources_are_named(tmp_path, tree):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        im2rec.main(["--list", str(tmp_path / "a"), str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="a.lst: no such list; --list makes one"):
        im2rec.main([str(tmp_path / "a"), str(tree)])
    with pytest.raises(UsageError, match="holds no images; --recursive"):
        im2rec.main(["--list", str(tmp_path / "a"), str(tree)])
    write_list(tmp_path / "a.lst", ["x.jpg"])
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        im2rec.main([str(tmp_path / "a"), str(tmp_path / "nowhere")])
    write_list(tmp_path / "a.lst", [f"{number}.jpg" for number in range(200)])
    with pytest.raises(UsageError, match=r"none of the first 100 images can be packed \(99.jpg: no such file\)"):
        im2rec.main([str(tmp_path / "a"), str(tree)])
    assert not (tmp_path / "a.rec").exists()


# --- packing ---


def test_order_labels_and_bytes_with_several_workers(tmp_path):
    names, data = [f"{number}.jpg" for number in range(70)], {}
    for seed, name in enumerate(names):
        data[name] = encoded(picture(20 + seed, 30, seed))
        (tmp_path / name).write_bytes(data[name])
    names = names[::-1]
    path = write_list(tmp_path / "a.lst", names, [[number / 2, number, -1] for number in range(70)])
    packed = pack_list(path, tmp_path, Conversion(), workers=3)
    assert (packed.written, packed.rejected) == (70, 0)
    found = records(tmp_path / "a.rec")
    # JPEGs that need no change are packed untouched.
    assert [bytes(image) for _, image in found] == [data[name] for name in names]
    np.testing.assert_array_equal([header.label for header, _ in found], [[n / 2, n, -1] for n in range(70)])
    assert [header.id for header, _ in found] == list(range(70))
    one = (tmp_path / "a.rec").read_bytes()
    pack_list(path, tmp_path, Conversion(), workers=1)
    assert (tmp_path / "a.rec").read_bytes() == one
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.tsv"))


def test_mxnet_reads_what_we_pack(tree, tmp_path):
    from mxnet_compat import mx

    assert lists_command.folder_main([str(tree), str(tmp_path / "set"), "--resize", "24", "--num-thread", "1"]) == 0
    file = mx.recordio.MXIndexedRecordIO(str(tmp_path / "set.idx"), str(tmp_path / "set.rec"), "r")
    for item in read_list(tmp_path / "set.lst"):
        header, image = mx.recordio.unpack_img(file.read_idx(item.key))
        assert (header.label, header.id) == (item.labels[0], item.key)
        assert image.shape == (24, 36, 3)
    expected = cv2.resize(picture(40, 60, 0), (36, 24))
    image = mx.recordio.unpack_img(file.read_idx(0))[1][..., ::-1]
    assert np.abs(image.astype(int) - expected).mean() < 4


UNUSUAL = {
    "cmyk.jpg": lambda image: encoded(Image.fromarray(image).convert("CMYK")),
    "png.png": lambda image: encoded(image, "PNG"),
    "alpha.png": lambda image: encoded(Image.fromarray(image).convert("RGBA"), "PNG"),
    "palette.png": lambda image: encoded(Image.fromarray(image).quantize(256), "PNG"),
    "deep.png": lambda image: cv2.imencode(".png", image[..., ::-1].astype(np.uint16) * 257)[1].tobytes(),
    "webp.webp": lambda image: encoded(image, "WEBP"),
    "quarter.jpg": lambda image: rotated(image, 6),
    "head.jpg": lambda image: rotated(image, 3),
    # As some of ImageNet's files: the ending lies.
    "lies.jpg": lambda image: encoded(image, "PNG"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_become_upright_rgb_jpegs(tmp_path, name):
    image = picture()
    (tmp_path / name).write_bytes(UNUSUAL[name](image))
    pack_list(write_list(tmp_path / "a.lst", [name]), tmp_path, Conversion())
    packed = bytes(records(tmp_path / "a.rec")[0][1])
    with Image.open(io.BytesIO(packed)) as opened:
        assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (60, 40))
        assert opened.getexif().get(0x0112, 1) == 1
    assert np.abs(images_of(tmp_path / "a.rec")[0].astype(int) - image).mean() < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_images_become_rgb(tmp_path, kind):
    grey = Image.fromarray(picture()).convert("L")
    (tmp_path / "a.img").write_bytes(encoded(grey, kind))
    (tmp_path / "b.img").write_bytes(cv2.imencode(".png", np.asarray(grey).astype(np.uint16) * 257)[1].tobytes())
    pack_list(write_list(tmp_path / "a.lst", ["a.img", "b.img"]), tmp_path, Conversion())
    for image in images_of(tmp_path / "a.rec"):
        assert np.abs(image.astype(int) - np.asarray(grey)[..., None]).mean() < 3
    with Image.open(io.BytesIO(records(tmp_path / "a.rec")[0][1])) as opened:
        assert opened.mode == "RGB"


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"resize": 20}, (20, 30)),
        ({"resize": 80}, (80, 120)),
        ({"center_crop": True}, (40, 40)),
        ({"center_crop": True, "resize": 16}, (16, 16)),
        ({"resize": 20, "encoding": ".png", "quality": 9}, (20, 30)),
    ],
)
def test_resize_and_crop(tmp_path, options, shape):
    image = picture(40, 60)
    (tmp_path / "wide.png").write_bytes(encoded(image, "PNG"))
    (tmp_path / "tall.png").write_bytes(encoded(np.ascontiguousarray(image.transpose(1, 0, 2)), "PNG"))
    pack_list(write_list(tmp_path / "a.lst", ["wide.png", "tall.png"]), tmp_path, Conversion(**options))
    wide, tall = images_of(tmp_path / "a.rec")
    assert wide.shape == (*shape, 3)
    assert tall.shape == (*shape[::-1], 3)
    source = image[:, 10:50] if options.get("center_crop") else image
    expected = cv2.resize(source, shape[::-1])
    assert np.abs(wide.astype(int) - expected).mean() < 4
    assert np.abs(tall.astype(int) - expected.transpose(1, 0, 2)).mean() < 4
    assert bytes(records(tmp_path / "a.rec")[0][1][:4]).startswith(b"\x89PNG" if "encoding" in options else b"\xff\xd8")


def test_a_jpeg_of_the_wanted_size_is_passed_through(tmp_path):
    data = encoded(picture(24, 36))
    (tmp_path / "a.jpg").write_bytes(data)
    path = write_list(tmp_path / "a.lst", ["a.jpg"])
    pack_list(path, tmp_path, Conversion(resize=24))
    assert bytes(records(tmp_path / "a.rec")[0][1]) == data
    pack_list(path, tmp_path, Conversion(resize=24, center_crop=True))
    assert images_of(tmp_path / "a.rec")[0].shape == (24, 24, 3)


def test_large_jpegs_are_reduced_well(tmp_path):
    image = picture(400, 600)
    (tmp_path / "a.jpg").write_bytes(encoded(image))
    pack_list(write_list(tmp_path / "a.lst", ["a.jpg"]), tmp_path, Conversion(resize=48))
    packed = images_of(tmp_path / "a.rec")[0]
    assert packed.shape == (48, 72, 3)
    assert np.abs(packed.astype(int) - cv2.resize(image, (72, 48), interpolation=cv2.INTER_AREA)).mean() < 3


@pytest.mark.parametrize(("color", "channels", "depth"), [(1, 3, np.uint8), (0, 1, np.uint8), (-1, 4, np.uint16)])
def test_color_option_with_png(tmp_path, color, channels, depth):
    image = np.dstack([picture(), np.full((40, 60), 128, np.uint8)])
    deep = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA).astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    arguments = ["--encoding", ".png", "--color", str(color), "--num-thread", "1", str(tmp_path / "a"), str(tmp_path)]
    write_list(tmp_path / "a.lst", ["a.png"])
    assert im2rec.main(arguments) == 0
    packed = cv2.imdecode(np.frombuffer(records(tmp_path / "a.rec")[0][1], np.uint8), cv2.IMREAD_UNCHANGED)
    assert packed.dtype == depth
    assert (packed.shape[2] if packed.ndim == 3 else 1) == channels
    if color == -1:
        np.testing.assert_array_equal(packed, deep)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_packed_with_alpha_stand_upright_too(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture()
    (tmp_path / "a.img").write_bytes(encoded(np.ascontiguousarray(np.rot90(image)), kind, exif=exif))
    pack_list(write_list(tmp_path / "a.lst", ["a.img"]), tmp_path, Conversion(color=-1, encoding=".png", quality=1))
    assert np.abs(images_of(tmp_path / "a.rec")[0].astype(int) - image).mean() < 4


# --- planes instead of RGB ---


needs_turbojpeg = pytest.mark.skipif(not has_library(), reason="libturbojpeg is not installed on the system")


@needs_turbojpeg
@pytest.mark.parametrize("shape", [(40, 60), (41, 61), (61, 40), (164, 246), (333, 501)])
@pytest.mark.parametrize(
    "options",
    [{"resize": 40}, {"resize": 31}, {"center_crop": True}, {"center_crop": True, "resize": 21}, {"resize": 70}],
    ids=str,
)
def test_planes_show_the_same_picture_as_rgb(shape, options):
    data = encoded(picture(*shape), subsampling=2)
    by_planes, by_rgb = convert(data, Conversion(yuv_planes=True, **options)), convert(data, Conversion(**options))
    assert simplejpeg.decode_jpeg_header(by_planes) == simplejpeg.decode_jpeg_header(by_rgb)
    difference = np.abs(simplejpeg.decode_jpeg(by_planes).astype(int) - simplejpeg.decode_jpeg(by_rgb))
    assert difference.mean() < 5


@needs_turbojpeg
@pytest.mark.parametrize("shape", [(333, 500), (375, 501), (500, 333)])
def test_chroma_of_planes_lies_where_luma_does(shape):
    data = encoded(picture(*shape), subsampling=2)
    images = [convert(data, Conversion(resize=256, yuv_planes=way)) for way in (False, True)]
    by_rgb, by_planes = (simplejpeg.decode_jpeg(image).astype(int) for image in images)
    difference = np.abs(by_planes - by_rgb)
    for part in (difference, difference[0], difference[-1], difference[:, 0], difference[:, -1]):
        assert part.mean() < 1


@pytest.mark.parametrize("shape", [(16, 16), (15, 16), (16, 15), (15, 15)])
def test_encoded_planes_depend_on_nothing_around_them(shape):
    random = np.random.RandomState(0)
    half = [-(-length // 2) for length in shape]
    y, u, v = (random.randint(0, 256, size, np.uint8) for size in (shape, half, half))
    found = set()
    for around in range(0, 256, 15):
        memory = np.full(32 * 33, around, np.uint8)
        copy = memory[: y.size].reshape(shape)
        copy[:] = y
        found.add(Planes(copy, u, v).encode(90))
    assert len(found) == 1
    pixels = cv2.cvtColor(simplejpeg.decode_jpeg(found.pop()), cv2.COLOR_RGB2YCrCb)[..., 0]
    assert np.abs(pixels.astype(int) - y).mean() < 12


@needs_turbojpeg
def test_planes_only_where_chroma_is_halved(tmp_path):
    image = picture(80, 120)
    for data in (
        encoded(image, subsampling=0), encoded(image, subsampling=1), rotated(image, 6), encoded(image, "PNG"),
        encoded(Image.fromarray(image).convert("L")), encoded(Image.fromarray(image).convert("CMYK")),
    ):  # fmt: skip
        assert convert(data, Conversion(resize=30, yuv_planes=True)) == convert(data, Conversion(resize=30))


@needs_turbojpeg
def test_planes_of_large_jpegs_are_reduced_well():
    noise = np.random.RandomState(0).randint(0, 256, (400, 600, 1)).repeat(3, 2).astype(np.uint8)
    small = simplejpeg.decode_jpeg(convert(encoded(noise, subsampling=2), Conversion(resize=48, yuv_planes=True)))
    assert small.shape == (48, 72, 3)
    # Means over 8 x 8 pixels of noise, whose own standard deviation is 74.
    assert small.std() < 15


@needs_turbojpeg
def test_planes_of_enormous_claims_are_refused(monkeypatch):
    for module in ("images", "decode"):
        monkeypatch.setattr(f"data_prep.{module}.MAX_PIXELS", 100)
    with pytest.raises(DecodeError, match="claims 60 x 40 pixels"):
        convert(encoded(picture(), subsampling=2), Conversion(resize=20, yuv_planes=True))


@needs_turbojpeg
@pytest.mark.parametrize("damage", [lambda data: data[:-2], lambda data: data[: len(data) // 2]])
def test_incomplete_planes_are_refused(damage):
    data = encoded(np.random.RandomState(0).randint(0, 256, (90, 120, 3), np.uint8), subsampling=2)
    assert convert(data, Conversion(resize=30, yuv_planes=True))
    with pytest.raises(DecodeError, match="does not decode completely"):
        convert(damage(data), Conversion(resize=30, yuv_planes=True))


@needs_turbojpeg
def test_packs_of_planes_are_the_same_for_any_number_of_workers(tmp_path):
    tree = write_tree(tmp_path / "images", {"cat": 20, "dog": 20}, 83, 121)
    packs = []
    for workers in "12":
        prefix = tmp_path / workers
        im2rec.main(["--list", "--recursive", str(prefix), str(tree)])
        assert im2rec.main(["--resize", "31", "--yuv-planes", "--num-thread", workers, str(prefix), str(tree)]) == 0
        packs.append(prefix.with_suffix(".rec").read_bytes())
    assert packs[0] == packs[1]


def test_planes_without_the_library_are_refused_by_name(tmp_path, tree, monkeypatch):
    load_library.cache_clear()
    monkeypatch.setattr("data_prep.turbojpeg._LIBRARIES_ELSEWHERE", ["libturbojpeg_of_another_world.so"])
    monkeypatch.setattr("data_prep.turbojpeg._LIBRARIES", {})
    write_list(tmp_path / "a.lst", ["cat/000.jpg"])
    try:
        with pytest.raises(UsageError, match="needs the library libturbojpeg, 2.0 or later: .*apt-get install"):
            im2rec.main(["--resize", "20", "--yuv-planes", str(tmp_path / "a"), str(tree)])
    finally:
        load_library.cache_clear()


def test_pass_through_changes_nothing(tmp_path):
    files = {"a.png": encoded(picture(), "PNG"), "b.jpg": rotated(picture(), 6), "c.webp": encoded(picture(), "WEBP")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_list(tmp_path / "a.lst", list(files))
    assert im2rec.main(["--pass-through", "--num-thread", "1", str(tmp_path / "a"), str(tmp_path)]) == 0
    assert [bytes(image) for _, image in records(tmp_path / "a.rec")] == list(files.values())


def test_only_the_first_label_without_pack_label(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    write_list(tmp_path / "a.lst", ["a.jpg"], [[3, 4.5]])
    common = ["--num-thread", "1", str(tmp_path / "a"), str(tmp_path)]
    assert im2rec.main(common) == 0
    assert "only the first is packed" in capsys.readouterr().out
    assert records(tmp_path / "a.rec")[0][0][:2] == (0, 3.0)
    assert im2rec.main(["--pack-label", *common]) == 0
    assert records(tmp_path / "a.rec")[0][0].label.tolist() == [3, 4.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quality", "101"], "--quality 101: .jpg takes 1 to 100"),
        (["--quality", "95", "--encoding", ".png"], "--quality 95: .png takes 1 to 9"),
        (["--resize", "-1"], "--resize -1"),
        (["--pass-through", "--resize", "9"], "--pass-through changes no image"),
        (["--yuv-planes", "--pass-through"], "--yuv-planes makes colour JPEGs"),
        (["--yuv-planes", "--encoding", ".png"], "--yuv-planes makes colour JPEGs"),
        (["--yuv-planes", "--color", "0"], "--yuv-planes makes colour JPEGs"),
        (["--num-thread", "0"], "--num-thread 0"),
        (["--list", "--train-ratio", "0.9", "--test-ratio", "0.2"], "both ratios together"),
        (["--list", "--chunks", "0"], "--chunks must be 1"),
    ],
)
def test_options_that_cannot_work(tree, tmp_path, arguments, message):
    write_list(tmp_path / "a.lst", ["cat/000.jpg"])
    with pytest.raises(UsageError, match=message):
        im2rec.main([*arguments, "--recursive", str(tmp_path / "a"), str(tree)])


# --- images that are left out ---


def test_one_odd_image_does_not_stop_a_pack(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    plain = encoded(noise, subsampling=0)
    sampling = plain.index(b"\xff\xc0") + 11
    files = {
        "a.jpg": plain,
        # Chroma at a quarter of the rows, which simplejpeg has no name for; OpenCV takes it.
        "441.jpg": plain[:sampling] + b"\x14" + plain[sampling + 1 :],
        # A side of 85,333 pixels, which JPEG does not hold.
        "long.png": encoded(np.zeros((3, 2000, 3), np.uint8), "PNG"),
        "b.jpg": plain,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    packed = pack_list(write_list(tmp_path / "a.lst", list(files)), tmp_path, Conversion(resize=128))
    assert (packed.written, packed.rejected) == (3, 1)
    assert [header.id for header, _ in records(tmp_path / "a.rec")] == [0, 1, 3]
    assert re.match("2\tlong.png\tit cannot be converted .", (tmp_path / "a.rejected.tsv").read_text())


@pytest.mark.parametrize("options", [[], ["--pass-through"], ["--pass-through", "--check", "markers"]], ids=" ".join)
def test_incomplete_images_are_left_out_listed_and_counted(tmp_path, options, capsys):
    noise = np.random.RandomState(0).randint(0, 256, (90, 120, 3), np.uint8)
    jpeg, png, webp = encoded(noise), encoded(noise, "PNG"), encoded(noise, "WEBP")
    flipped = bytearray(jpeg)
    flipped[len(jpeg) // 2 : len(jpeg) // 2 + 2] = b"\xff\xd9"
    bad = {
        "short.jpg": jpeg[:-2],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "ended.jpg": bytes(flipped),
        "half.png": png[: len(png) // 2],
        "half.webp": webp[: len(webp) // 2],
        "empty.jpg": b"",
        "text.jpg": b"<html>not found</html>",
    }
    good = {"a.jpg": jpeg, "b.jpg": encoded(picture(), progressive=True)}
    names = ["a.jpg", *bad, "b.jpg", "missing.jpg"]
    for name, data in {**good, **bad}.items():
        (tmp_path / name).write_bytes(data)
    write_list(tmp_path / "a.lst", names)
    arguments = [*options, str(tmp_path / "a"), str(tmp_path)]
    assert im2rec.main(["--num-thread", "2", *arguments]) == 1
    assert "2 images packed, 8 left out" in capsys.readouterr().out
    assert [header.id for header, _ in records(tmp_path / "a.rec")] == [0, 8]
    rows = [line.split("\t") for line in (tmp_path / "a.rejected.tsv").read_text().splitlines()]
    assert [(int(row[0]), row[1]) for row in rows] == [(1 + n, name) for n, name in enumerate([*bad])] + [
        (9, "missing.jpg")
    ]
    assert all(len(row) == 3 and row[2] for row in rows)
    assert rows[-1][2] == "no such file"
    assert im2rec.main(["--allow-rejects", "8", "--num-thread", "1", *arguments]) == 0
    assert im2rec.main(["--allow-rejects", "7", "--num-thread", "1", *arguments]) == 1
    for name in [*bad, "missing.jpg"]:
        (tmp_path / name).write_bytes(jpeg)
    assert im2rec.main(["--num-thread", "1", *arguments]) == 0
    assert not (tmp_path / "a.rejected.tsv").exists()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"\xff\xd9" * 9}, {"subsampling": 0}]
)
def test_the_end_of_a_jpeg_is_found_by_its_markers(options):
    data = encoded(np.random.RandomState(0).randint(0, 256, (50, 70, 3), np.uint8), **options)
    assert jpeg_reaches_its_end(data)
    assert jpeg_reaches_its_end(data + bytes(5))
    assert not jpeg_reaches_its_end(data + b"more")
    assert not any(jpeg_reaches_its_end(data[:end]) for end in range(2, len(data)))


def test_nothing_that_can_be_packed_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    write_list(tmp_path / "a.lst", ["a.jpg"])
    with pytest.raises(ProjectError, match=r"none of its 1 images can be packed; see .*rejected.tsv"):
        pack_list(tmp_path / "a.lst", tmp_path, Conversion())
    assert not (tmp_path / "a.rec").exists()


# --- interruption ---


class Interruption(Exception):
    pass


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A pack of 60 images, 6 of them bad, that is interrupted when 25 images are done; and what it should become."""
    names = []
    for number in range(60):
        names.append(f"{number}.jpg")
        data = encoded(picture(30, 40, number))
        (tmp_path / names[-1]).write_bytes(data[:100] if number % 10 == 3 else data)
    write_list(tmp_path / "a.lst", names)
    write_list(tmp_path / "whole.lst", names)
    pack_list(tmp_path / "whole.lst", tmp_path, Conversion())
    original, calls = packing._take, []

    def take(*arguments):
        calls.append(1)
        if len(calls) > 25:
            raise Interruption
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_take", take)
        with pytest.raises(Interruption):
            pack_list(tmp_path / "a.lst", tmp_path, Conversion())
    assert not (tmp_path / "a.rec").exists()
    return tmp_path


def assert_whole(folder):
    for ending in ("rec", "idx", "rejected.tsv"):
        assert (folder / f"a.{ending}").read_bytes() == (folder / f"whole.{ending}").read_bytes()
    assert not list(folder.glob("*.part"))


def test_resume_does_not_redo_finished_work(interrupted):
    # What is done already is not read again: it could not be.
    for number in range(25):
        (interrupted / f"{number}.jpg").unlink()
    packed = pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
    assert (packed.written, packed.rejected, packed.resumed) == (54, 6, 25)
    assert_whole(interrupted)


@pytest.mark.parametrize("damage", ["a.rec.part", "a.idx.part", "a.rejected.tsv.part"])
def test_resume_after_files_were_cut_by_the_interruption(interrupted, damage):
    path = interrupted / damage
    path.write_bytes(path.read_bytes()[:-5])
    packed = pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
    assert packed.resumed < 25
    assert_whole(interrupted)


def test_resume_knows_packs_from_before_an_option_existed(interrupted):
    manifest = interrupted / "a.pack.json"
    for rounds in range(2):  # an interrupted pack, then a finished one
        content = json.loads(manifest.read_text())
        assert content["made_of"].pop("yuv_planes") is False
        manifest.write_text(json.dumps(content))
        packed = pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
        assert packed.resumed == (60 if rounds else 25)
    assert_whole(interrupted)


def test_resume_of_a_finished_pack_does_nothing(interrupted):
    pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
    for number in range(60):
        (interrupted / f"{number}.jpg").unlink()
    packed = pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
    assert (packed.written, packed.rejected, packed.resumed) == (54, 6, 60)
    assert_whole(interrupted)


def test_resume_with_other_options_is_refused(interrupted):
    with pytest.raises(UsageError, match="was begun with another resize: use the same again, or leave out --resume"):
        pack_list(interrupted / "a.lst", interrupted, Conversion(resize=9), resume=True)
    lines = (interrupted / "a.lst").read_text().splitlines(keepends=True)
    (interrupted / "a.lst").write_text("".join(lines[::-1]))
    with pytest.raises(UsageError, match="another list_sha256"):
        pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
    packed = pack_list(interrupted / "a.lst", interrupted, Conversion(resize=9))
    assert packed.resumed == 0
    assert images_of(interrupted / "a.rec")[0].shape[0] == 9


def test_an_interrupted_pack_leaves_the_finished_one_alone(interrupted):
    pack_list(interrupted / "a.lst", interrupted, Conversion(), resume=True)
    before = (interrupted / "a.rec").read_bytes()
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_take", lambda *arguments: 1 / 0)
        pack_list(interrupted / "a.lst", interrupted, Conversion(resize=9))
    assert (interrupted / "a.rec").read_bytes() == before


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_command_leaves_no_process_and_can_be_resumed(tmp_path):
    data = encoded(np.random.RandomState(0).randint(0, 256, (1200, 1200, 3), np.uint8))
    (tmp_path / "a.jpg").write_bytes(data)
    names = ["a.jpg"] * 400
    write_list(tmp_path / "a.lst", names)
    command = [sys.executable, "-m", "data_prep", "im2rec", "--resize", "32", "--num-thread", "2"]
    command += [str(tmp_path / "a"), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        partial = tmp_path / "a.idx.part"
        while not (partial.exists() and partial.stat().st_size):  # a chunk of images is written
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        group = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _session(entry) == process.pid]
        assert len(group) >= 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while any(running(pid) for pid in group):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "a.rec").exists()
    packed = pack_list(tmp_path / "a.lst", tmp_path, Conversion(resize=32), all_labels=False, resume=True)
    assert packed.written == 400
    assert packed.resumed >= 1


def _session(entry: str) -> int:
    try:
        return int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[3])
    except OSError:
        return -1


def test_the_script_runs_from_anywhere(tree, tmp_path):
    script = ROOT / "data_prep" / "im2rec.py"
    for options in (["--list", "--recursive"], ["--resize", "16", "--num-thread", "2"]):
        result = subprocess.run(
            [sys.executable, str(script), *options, "set", str(tree)], cwd=tmp_path, capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (0, "")
    assert [image.shape for image in images_of(tmp_path / "set.rec")] == [(16, 24, 3)] * 12
    result = subprocess.run(
        [sys.executable, str(script), "set", "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (2, "error: nowhere: no such folder\n")


def test_a_full_disk_ends_with_one_line_and_can_be_resumed(tmp_path, tree, capsys, file_size_limit):
    """The limit on a file's size stands for the disk: writing fails in the same way, after a part was written."""
    write_list(tmp_path / "a.lst", ["cat/000.jpg"] * 300)
    arguments = ["--num-thread", "1", str(tmp_path / "a"), str(tree)]
    with file_size_limit(100_000):
        status = run_command(lambda: im2rec.main(arguments))
    assert status == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "a.rec: cannot be written: File too large; what is packed is kept: go on with --resume" in message
    assert not (tmp_path / "a.rec").exists()
    assert im2rec.main(["--resume", *arguments]) == 0
    assert re.search(r"300 images packed, 0 left out \((\d+) of them", capsys.readouterr().out)
    assert len(records(tmp_path / "a.rec")) == 300
