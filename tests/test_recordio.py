"""The RecordIO format: byte equality with MXNet both ways, damaged files, interrupted writing, threads."""

from __future__ import annotations

import random
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_prep import recordio
from data_prep.recordio import (
    MAGIC_BYTES,
    Header,
    RecordError,
    RecordFile,
    RecordWriter,
    pack,
    partial_records,
    unpack,
)
from errors import ProjectError, UsageError

# The magic number at aligned and unaligned places, at the ends, repeated, across the padding.
PAYLOADS = [
    b"",
    b"a",
    b"abcd",
    MAGIC_BYTES,
    MAGIC_BYTES * 3,
    b"x" + MAGIC_BYTES,
    b"abcd" + MAGIC_BYTES,
    b"abcd" + MAGIC_BYTES + b"e",
    b"abc" + MAGIC_BYTES + b"d" + MAGIC_BYTES + b"efgh" + MAGIC_BYTES,
    MAGIC_BYTES + b"ab" + MAGIC_BYTES + b"cd" + MAGIC_BYTES[:3],
    MAGIC_BYTES[:2] + MAGIC_BYTES + MAGIC_BYTES[2:],
    bytes(range(256)) * 1100,
]


def write_pack(path, payloads, keys=None):
    with RecordWriter(path) as writer:
        for key, payload in zip(keys or range(len(payloads)), payloads):
            writer.write(key, payload)
    return path


def image_payloads(count):
    return [pack(Header(0, float(number % 10), number), bytes([number]) * (50 + number)) for number in range(count)]


@pytest.fixture
def rec(tmp_path):
    return write_pack(tmp_path / "small.rec", image_payloads(20))


def test_our_files_equal_those_of_mxnet(tmp_path):
    from mxnet_compat import mx

    theirs = mx.recordio.MXIndexedRecordIO(str(tmp_path / "theirs.idx"), str(tmp_path / "theirs.rec"), "w")
    for key, payload in enumerate(PAYLOADS):
        theirs.write_idx(key * 3, payload)
    theirs.close()
    write_pack(tmp_path / "ours.rec", PAYLOADS, [3 * key for key in range(len(PAYLOADS))])
    for ending in ("rec", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    ours = mx.recordio.MXIndexedRecordIO(str(tmp_path / "ours.idx"), str(tmp_path / "ours.rec"), "r")
    assert [ours.read_idx(key) for key in ours.keys] == PAYLOADS
    with RecordFile(tmp_path / "theirs.rec") as file:
        assert [bytes(file.read(number)) for number in range(len(file))] == PAYLOADS
        assert file.keys.tolist() == ours.keys


def test_random_payloads_of_magic_fragments_equal_those_of_mxnet(tmp_path):
    from mxnet_compat import mx

    generator = random.Random(1)
    pieces = [MAGIC_BYTES, MAGIC_BYTES[:1], MAGIC_BYTES[1:], b"\0", b"\n", b"1234"]
    payloads = [b"".join(generator.choices(pieces, k=generator.randrange(12))) for _ in range(300)]
    theirs = mx.recordio.MXRecordIO(str(tmp_path / "theirs.rec"), "w")
    for payload in payloads:
        theirs.write(payload)
    theirs.close()
    write_pack(tmp_path / "ours.rec", payloads)
    assert (tmp_path / "ours.rec").read_bytes() == (tmp_path / "theirs.rec").read_bytes()
    with RecordFile(tmp_path / "ours.rec") as file:
        assert [bytes(file.read(number)) for number in range(len(file))] == payloads


@pytest.mark.parametrize("label", [3, 2.5, np.float32(7), [1.0], [1, 2.5, -3], np.arange(5)])
def test_headers_equal_those_of_mxnet(label):
    from mxnet_compat import mx

    ours, theirs = pack(Header(0, label, 9, 4), b"image"), mx.recordio.pack((0, label, 9, 4), b"image")
    assert ours == theirs
    header, image = unpack(ours)
    expected, _ = mx.recordio.unpack(theirs)
    assert (header.flag, header.id, header.id2, bytes(image)) == (expected.flag, 9, 4, b"image")
    np.testing.assert_array_equal(header.label, expected.label)


def test_records_of_512_mib_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "MAX_PAYLOAD", 100)
    with pytest.raises(RecordError, match="key 1 has 100 bytes"):
        write_pack(tmp_path / "a.rec", [bytes(99), bytes(100)])
    assert list(tmp_path.iterdir()) == []
    assert recordio.pack(Header(0, 1, 0), b"")


def test_labels_are_read_for_plain_split_and_several(tmp_path):
    single = [
        pack(Header(0, 4.0, 1), b"abcd"),
        pack(Header(0, 5.0, 2), b"1234" + MAGIC_BYTES),
        pack(Header(1, [6], 3), b""),
    ]
    with RecordFile(write_pack(tmp_path / "single.rec", single)) as file:
        np.testing.assert_array_equal(file.labels(), np.float32([4, 5, 6]))
    # The id of the first header is the magic number at an aligned place: even the header is split.
    magic_id = struct.unpack("<I", MAGIC_BYTES)[0]
    several = [pack(Header(2, [1, 2], magic_id), b"image"), pack(Header(2, [3, 4], 5), b"")]
    with RecordFile(write_pack(tmp_path / "several.rec", several)) as file:
        np.testing.assert_array_equal(file.labels(), np.float32([[1, 2], [3, 4]]))
        assert file.header(0).id == magic_id
    mixed = [pack(Header(2, [3, 4], 5), b"image"), single[0]]
    file = RecordFile(write_pack(tmp_path / "mixed.rec", mixed))
    with file, pytest.raises(RecordError, match=r"record 1 at offset 48: another number of labels"):
        file.labels()


@pytest.mark.parametrize("with_index", [True, False])
def test_range_records_of_face_packs_are_left_out(tmp_path, with_index):
    images = [pack(Header(0, float(number // 2), 0), b"image%d" % number) for number in range(4)]
    ranges = [
        pack(Header(2, [5.0, 7.0], 0), b""),
        pack(Header(2, [1.0, 3.0], 0), b""),
        pack(Header(2, [3.0, 5.0], 0), b""),
    ]
    path = write_pack(tmp_path / "faces.rec", [ranges[0], *images, *ranges[1:]], [0, 1, 2, 3, 4, 5, 6])
    if not with_index:
        path.with_suffix(".idx").unlink()
    with RecordFile(path) as file:
        assert file.keys.tolist() == [1, 2, 3, 4]
        assert file.range_records == 3
        assert file.labels().tolist() == [0, 0, 1, 1]
        assert bytes(file.unpack(3)[1]) == b"image3"


def test_a_missing_index_is_rebuilt_with_a_warning(rec, caplog):
    with RecordFile(rec) as file:
        offsets = file.offsets
    rec.with_suffix(".idx").unlink()
    with RecordFile(rec) as file:
        assert file.keys.tolist() == list(range(20))
        np.testing.assert_array_equal(file.offsets, offsets)
    assert "small.idx is missing" in caplog.text
    assert not rec.with_suffix(".idx").exists()


def test_records_keep_the_order_of_the_index(rec):
    lines = rec.with_suffix(".idx").read_text().splitlines()
    shuffled = [lines[number] for number in (7, 3, 19, 0)]
    other = rec.with_name("other.idx")
    other.write_text("\n".join(shuffled))
    with RecordFile(rec, other) as file:
        assert file.keys.tolist() == [7, 3, 19, 0]
        assert [bytes(file.unpack(number)[1])[:1] for number in range(4)] == [
            b"\x07",
            b"\x03",
            b"\x13",
            b"\x00",
        ]


def test_many_threads_read_the_same_file(tmp_path):
    payloads = [random.Random(number).randbytes(1000 * number % 7919) + MAGIC_BYTES for number in range(200)]
    with RecordFile(write_pack(tmp_path / "a.rec", payloads)) as file, ThreadPoolExecutor(8) as pool:
        order = random.Random(0).choices(range(200), k=3000)
        for number, payload in zip(order, pool.map(file.read, order)):
            assert payload == payloads[number]


def test_records_larger_than_one_read(tmp_path):
    payloads = [random.Random(number).randbytes(400_000) + MAGIC_BYTES + b"end" for number in range(3)]
    with RecordFile(write_pack(tmp_path / "a.rec", payloads)) as file:
        assert [bytes(file.read(number)) for number in range(3)] == payloads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data, at: data[:at] + b"\0" + data[at + 1 :],
            "record 5 at offset {at}: no record begins here",
        ),
        (lambda data, at: data[: at + 7] + b"\x60" + data[at + 8 :], "begins in the middle of a record"),
        (lambda data, at: data[: at + 7] + b"\x20" + data[at + 8 :], "is cut off: another record follows"),
        (
            lambda data, at: data[: at + 4] + b"\xff\xff\xff\x1f" + data[at + 8 :],
            "the file ends .* bytes before",
        ),
        (lambda data, at: data[: at + 4] + b"\x05\0\0\0" + data[at + 8 :], "too short for an image header"),
        (lambda data, at: data[: at + 8] + b"\xff\xff\xff\xff" + data[at + 12 :], "says 4294967295 labels"),
    ],
)
def test_a_damaged_record_is_named(rec, change, message):
    with RecordFile(rec) as file:
        offset = int(file.offsets[5])
    rec.write_bytes(change(rec.read_bytes(), offset))
    with RecordFile(rec) as file:
        for broken in (lambda: file.unpack(5), file.labels):
            with pytest.raises(RecordError, match=message.format(at=offset)) as caught:
                broken()
            assert f"small.rec: record 5 at offset {offset}: " in str(caught.value)
        assert file.header(6).id == 6


def test_a_truncated_pack_is_refused_when_opened(rec):
    data = rec.read_bytes()
    with RecordFile(rec) as file:
        last = int(file.offsets[-1])
    rec.write_bytes(data[: last + 60])
    with pytest.raises(RecordError, match=f"small.rec: record 19 at offset {last}: the file ends 41 bytes before"):
        RecordFile(rec)
    rec.write_bytes(data[: last - 4])
    with pytest.raises(RecordError, match=r"small.idx, line 20: offset \d+ is outside the pack .*truncated"):
        RecordFile(rec)
    rec.with_suffix(".idx").unlink()
    with pytest.raises(RecordError, match="record 18 at offset"):
        RecordFile(rec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"0\t0\n1\t-4\n", "line 2: offset -4 is outside the pack"),
        (b"0\t0\n1\t6\n", "line 2: offset 6 is no multiple of 4"),
        (b"0\t99999999996\n", "line 1: offset 99999999996 is outside the pack"),
        (b"0\t99999999999999999999999999\n", "line 1: expected `key TAB offset`"),
        (b"0\t0\nno numbers\n", "line 2: expected `key TAB offset`, found 'no numbers'"),
        (b"0\t0\t0\n", "line 1: expected"),
        (b"\x00\xff\xfe\n", "line 1: expected"),
        (b"", "the index is empty"),
        (b"0\t0\n" * 9999, "too many for an index"),
    ],
)
def test_a_hostile_index_is_refused(rec, text, message):
    rec.with_suffix(".idx").write_bytes(text)
    with pytest.raises(RecordError, match=message):
        RecordFile(rec)


def test_an_index_that_points_into_a_record(rec):
    rec.with_suffix(".idx").write_text("0\t0\n1\t8\n")
    with pytest.raises(RecordError, match="record 1 at offset 8: no record begins here"):
        RecordFile(rec)


def test_an_index_of_fewer_records_is_warned_of(rec, caplog):
    lines = rec.with_suffix(".idx").read_text().splitlines(keepends=True)
    rec.with_suffix(".idx").write_text("".join(lines[:10]))
    with RecordFile(rec) as file:
        assert len(file) == 10
    assert "lists fewer records" in caplog.text


def test_missing_and_empty_packs(tmp_path):
    with pytest.raises(UsageError, match=r"no.rec: no such file"):
        RecordFile(tmp_path / "no.rec")
    (tmp_path / "empty.rec").touch()
    with pytest.raises(UsageError, match=r"empty.rec: the file is empty"):
        RecordFile(tmp_path / "empty.rec")
    with pytest.raises(UsageError, match="not a file"):
        RecordFile(tmp_path)


def test_an_interrupted_pack_is_continued_from_its_whole_records(tmp_path):
    payloads = [*PAYLOADS, *image_payloads(10)]
    whole = write_pack(tmp_path / "whole.rec", payloads)
    writer = RecordWriter(tmp_path / "a.rec", keep_partial=True)
    for key, payload in enumerate(payloads[:15]):
        writer.write(key, payload)
    writer.abort()
    assert not (tmp_path / "a.rec").exists()
    partial = tmp_path / "a.rec.part"
    data, index = partial.read_bytes(), (tmp_path / "a.idx.part").read_bytes()
    for cut, index_cut in ((0, 0), (1, 0), (40, 0), (0, 3), (0, len(index)), (len(data), 0), (500, 30)):
        partial.write_bytes(data[: len(data) - cut])
        (tmp_path / "a.idx.part").write_bytes(index[: len(index) - index_cut])
        done = list(partial_records(tmp_path / "a.rec"))
        assert [record.key for record in done] == list(range(len(done)))
        assert len(done) == 15 or cut or index_cut
        start = done[-1][1:] if done else (0, 0)
        with RecordWriter(tmp_path / "a.rec", keep_partial=True, start=start) as writer:
            for key in range(len(done), len(payloads)):
                writer.write(key, payloads[key])
        for ending in (".rec", ".idx"):
            assert (tmp_path / "a").with_suffix(ending).read_bytes() == whole.with_suffix(ending).read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_is_one_line(tmp_path):
    path = tmp_path / "full.rec"
    writer = RecordWriter(path, keep_partial=True)
    writer._files[0].close()
    writer._files[0] = open("/dev/full", "wb")  # noqa: SIM115 - closed by abort()
    with pytest.raises(ProjectError, match=r"full.rec: cannot be written: No space left on device"), writer:
        for key in range(100):
            writer.write(key, bytes(10_000))
    assert not path.exists()


def test_two_writers_of_one_pack(tmp_path):
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, b"first")
        with pytest.raises(ProjectError, match="another process is writing it"):
            RecordWriter(tmp_path / "a.rec")
        writer.write(1, b"second")
    with RecordFile(tmp_path / "a.rec") as file:
        assert [bytes(file.read(number)) for number in range(2)] == [b"first", b"second"]
