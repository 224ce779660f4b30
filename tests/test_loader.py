"""The loader: the same bits whatever the threads, every sample once, bad images named, nothing left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.recordio import Header, RecordFile, RecordWriter, pack
from errors import ProjectError, UsageError
from training.augment import train_augmenter, validation_augmenter
from training.augment_options import AugmentOptions
from training.loader import Loader, default_threads, epoch_order, processors
from training.loader_speed import describe, measure_loader, report_io
from training.options import parse_args

ROOT = Path(__file__).resolve().parent.parent
SIZE = 24


def picture(index: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A picture that tells its number: grey, of value `index`, with some structure."""
    image = np.full((height, width), index, np.uint8)
    image[::3] += 1
    return image


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def write_pack(path: Path, payloads: list[bytes], labels=None) -> RecordFile:
    with RecordWriter(path) as writer:
        for index, data in enumerate(payloads):
            label = float(index % 5) if labels is None else labels[index]
            writer.write(1000 + index, pack(Header(0, label, index), data))
    return RecordFile(path)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """53 PNGs whose pixels tell their number."""
    return write_pack(tmp_path_factory.mktemp("pack") / "train.rec", [png(picture(i)) for i in range(53)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 JPEGs and PNGs of different sizes."""
    rng = np.random.default_rng(1)
    payloads = []
    for index in range(30):
        noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = cv2.resize(noise, tuple(int(edge) for edge in rng.integers(40, 200, 2)), interpolation=cv2.INTER_CUBIC)
        payloads.append(cv2.imencode(".png" if index % 3 == 0 else ".jpg", image)[1].tobytes())
    return write_pack(tmp_path_factory.mktemp("photos") / "photos.rec", payloads)


def loader(records: RecordFile, batch_size: int = 8, **options) -> Loader:
    return Loader(records, batch_size, (3, SIZE, SIZE), **options)


def numbers(batches) -> list[int]:
    """Numbers of the samples that count, in order; only for images that are not augmented."""
    return [int(image.min()) for batch in batches for image in batch.images[: batch.valid]]


def content(batches) -> list[tuple[bytes, bytes, int]]:
    return [(batch.images.tobytes(), batch.labels.tobytes(), batch.pad) for batch in batches]


OPTIONS = {
    "level 1": AugmentOptions(image_size=SIZE, pad=3),
    "level 3": AugmentOptions(image_size=SIZE, aug_level=3),
    "all": AugmentOptions(
        image_size=SIZE, aug_level=3, min_random_area=0.1, brightness=0.4, contrast=0.4, saturation=0.4, pca_noise=0.1,
        random_erasing=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_threads_do_not_change_a_bit(photos, name):
    augment = train_augmenter(OPTIONS[name])
    runs = [content(loader(photos, 4, augment=augment, threads=threads, seed=3).batches(2)) for threads in (1, 2, 7)]
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) == 8
    assert content(loader(photos, 4, augment=augment, seed=4).batches(2)) != runs[0]


def test_batch_is_what_engines_expect(records):
    batch = next(loader(records).batches(0))
    assert batch.images.dtype == np.uint8
    assert batch.images.shape == (8, 3, SIZE, SIZE)
    assert batch.images.flags.c_contiguous
    assert batch.labels.dtype == np.int64
    assert [int(image.min()) % 5 for image in batch.images] == batch.labels.tolist()
    np.testing.assert_array_equal(batch.images[3, 1], picture(int(batch.images[3].min())))


def test_channels_are_rgb(tmp_path):
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[..., 2] = 200  # OpenCV writes BGR: this is red
    payloads = [png(image), cv2.imencode(".jpg", image)[1].tobytes()]
    batch = next(loader(write_pack(tmp_path / "red.rec", payloads), 2, shuffle=False).batches(0))
    assert (batch.images[:, 0] > 190).all()
    assert (batch.images[:, 1:] < 10).all()


def test_every_epoch_is_another_permutation_of_the_whole_set(records):
    reader = loader(records)
    first, second = numbers(reader.batches(0)), numbers(reader.batches(1))
    assert sorted(first) == sorted(second) == list(range(53))
    assert first != second
    assert first == epoch_order(53, 0, 0).tolist() == numbers(reader.batches(0))
    assert numbers(loader(records, seed=1).batches(0)) != first
    # The order does not hang on the batch size.
    assert numbers(loader(records, 5).batches(0)) == first


def test_without_shuffling_the_order_is_the_packs(records):
    assert numbers(loader(records, shuffle=False).batches(4)) == list(range(53))


def test_last_batch_repeats_earlier_rows(records):
    batches = list(loader(records, shuffle=False).batches(0))
    assert [batch.pad for batch in batches] == [0] * 6 + [3]
    assert [int(image.min()) for image in batches[-1].images] == [48, 49, 50, 51, 52, 48, 49, 50]
    assert batches[-1].labels.tolist() == [3, 4, 0, 1, 2, 3, 4, 0]


def test_a_validation_batch_may_be_larger_than_the_set(records):
    (batch,) = loader(records, 64, shuffle=False).batches(0)
    assert (batch.valid, batch.pad) == (53, 11)
    assert numbers([batch]) == list(range(53))


@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_centre_crops_are_those_of_image_record_iter(tmp_path, kind):
    from mxnet_compat import mx

    rng = np.random.default_rng(2)
    pictures = [
        cv2.resize(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8), (44, 40), interpolation=cv2.INTER_CUBIC)
        for _ in range(6)
    ]
    records = write_pack(tmp_path / "centre.rec", [cv2.imencode(kind, picture)[1].tobytes() for picture in pictures])
    # The crop as large as the short edge, so that nothing is resized.
    augment = validation_augmenter(AugmentOptions(image_size=40))
    ours = next(Loader(records, 6, (3, 40, 40), augment=augment, shuffle=False).batches(0))
    theirs = mx.io.ImageRecordIter(
        path_imgrec=str(records.path), data_shape=(3, 40, 40), batch_size=6, shuffle=False, verbose=False
    ).next()
    np.testing.assert_array_equal(ours.images, theirs.data[0].asnumpy())
    np.testing.assert_array_equal(ours.labels, theirs.label[0].asnumpy())


class CountingRecords(RecordFile):
    """A pack that notes which records were read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: list[int] = []

    def unpack(self, index: int):
        self.seen.append(index)
        return super().unpack(index)


@pytest.mark.parametrize("start", [0, 3, 6, 7])
def test_starts_at_any_batch_without_reading_the_ones_before(records, start):
    augment = train_augmenter(OPTIONS["level 1"])
    counting = CountingRecords(records.path)
    whole = content(loader(records, augment=augment).batches(5))
    assert content(loader(counting, augment=augment).batches(5, start)) == whole[start:]
    assert sorted(counting.seen) == sorted(epoch_order(53, 0, 5)[8 * start :])


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_parts_share_an_epoch(records, parts, batch_size):
    readers = [loader(records, batch_size, num_parts=parts, part_index=part) for part in range(parts)]
    assert len({reader.steps_per_epoch for reader in readers}) == 1
    shares = [list(reader.batches(1)) for reader in readers]
    assert {len(share) for share in shares} == {readers[0].steps_per_epoch}
    assert sorted(sum((numbers(share) for share in shares), [])) == list(range(53))
    # Step by step the parts together see what one loader with the whole batch sees.
    whole = list(loader(records, batch_size * parts).batches(1))
    for step, batch in enumerate(whole):
        assert numbers([batch]) == sum((numbers([share[step]]) for share in shares), [])
    last = [share[-1].valid for share in shares]
    assert max(last) - min(last) <= 1


def test_a_part_without_samples_gets_a_batch_that_counts_nowhere(records):
    reader = loader(records, 4, num_parts=13, part_index=12)
    batch = list(reader.batches(0))[-1]
    assert (batch.valid, batch.pad, batch.images.shape[0]) == (0, 4, 4)
    assert int(batch.images[0].min()) == epoch_order(53, 0, 0)[0]


def damaged_pack(path: Path, bad: tuple[int, ...], count: int = 20) -> RecordFile:
    payloads = [cv2.imencode(".jpg", picture(5 * i))[1].tobytes() for i in range(count)]
    for index in bad:
        payloads[index] = payloads[index][: len(payloads[index]) // 2]
    return write_pack(path, payloads)


@pytest.mark.parametrize("threads", [1, 5])
def test_a_bad_image_is_named(tmp_path, threads):
    records = damaged_pack(tmp_path / "bad.rec", (9, 11))
    batches = loader(records, 8, shuffle=False, threads=threads).batches(0)
    next(batches)
    with pytest.raises(UsageError) as caught:
        next(batches)
    message = str(caught.value)
    assert f"bad.rec: record 9 at offset {records.offsets[9]} (key 1009)" in message
    assert "--skip-bad" in message
    assert "\n" not in message
    assert list(batches) == []


def test_skipped_images_become_padding(tmp_path):
    records = damaged_pack(tmp_path / "bad.rec", (0, 9, 11))
    for threads in (1, 3):
        reader = loader(records, 8, shuffle=False, threads=threads, skip_bad=True)
        batches = list(reader.batches(0))
        assert [batch.pad for batch in batches] == [1, 2, 4]
        assert reader.skipped == 3
        shown = [round(float(image.mean()) / 5) for image in batches[1].images]
        assert shown == [8, 10, 12, 13, 14, 15, 8, 10]
        assert batches[1].labels.tolist() == [3, 0, 2, 3, 4, 0, 3, 0]
        assert batches[0].labels[-1] == batches[0].labels[0] == 1


def test_a_batch_of_bad_images_counts_nowhere(tmp_path):
    records = damaged_pack(tmp_path / "bad.rec", tuple(range(4)), count=8)
    batches = list(loader(records, 4, shuffle=False, skip_bad=True).batches(0))
    assert [batch.pad for batch in batches] == [4, 0]
    assert not batches[0].images.any()


def test_skipped_counts_only_what_was_delivered(tmp_path):
    records = damaged_pack(tmp_path / "bad.rec", (1, 18))
    reader = loader(records, 4, shuffle=False, skip_bad=True)
    batches = reader.batches(0)
    next(batches)
    batches.close()
    assert reader.skipped == 1


def test_a_damaged_record_is_named(tmp_path):
    records = write_pack(tmp_path / "torn.rec", [png(picture(i)) for i in range(6)])
    data = bytearray(records.path.read_bytes())
    data[records.offsets[2]] ^= 0xFF
    records.path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=f"record 2 at offset {records.offsets[2]} .key 1002.: no record begins here"):
        list(loader(RecordFile(records.path), 3, shuffle=False).batches(0))


def failing_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if image.min() == 17:
        raise ZeroDivisionError("seventeen")
    return image


def test_an_error_in_a_worker_reaches_the_consumer(records):
    with pytest.raises(ProjectError, match="record 17 .*ZeroDivisionError: seventeen") as caught:
        list(loader(records, augment=failing_augment, skip_bad=True, shuffle=False).batches(0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_images_of_another_size_need_augmentation(records):
    with pytest.raises(ProjectError, match=r"record \d+ .*\(24, 24, 3\).*not uint8 \(32, 32, 3\)"):
        next(Loader(records, 4, (3, 32, 32)).batches(0))


def test_the_window_is_decided_before_decoding_only_where_nothing_is_lost(tmp_path):
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8), (200, 200))
    records = write_pack(
        tmp_path / "one.rec", [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()]
    )
    upright = cv2.imdecode(np.frombuffer(records.unpack(0)[1], np.uint8), cv2.IMREAD_COLOR)[..., ::-1].copy()
    for size, exact in ((150, True), (90, False)):
        augment = validation_augmenter(AugmentOptions(image_size=size, val_resize=size + 6))
        batch = next(Loader(records, 1, (3, size, size), augment=augment).batches(0))
        expected = augment(upright, np.random.default_rng(0)).transpose(2, 0, 1)
        difference = np.abs(batch.images[0].astype(int) - expected)
        assert (difference.max() == 0) == exact
        assert difference.mean() < 3


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")]


@pytest.mark.parametrize("end", ["finish", "close", "abandon", "raise", "close loader"])
def test_no_thread_is_left(records, end):
    reader = loader(records, 4, threads=3)
    batches = reader.batches(0)
    assert not loader_threads()
    next(batches)
    assert loader_threads()
    if end == "finish":
        list(batches)
    elif end == "close":
        batches.close()
    elif end == "close loader":
        reader.close()
        with pytest.raises(ProjectError, match="closed"):
            list(batches)
    elif end == "raise":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    del batches
    gc.collect()
    assert not loader_threads()


def test_memory_stays_flat(records):
    """However slow the consumer is, only a few batches are in work."""
    counting = CountingRecords(records.path)
    batches = loader(counting, 2, threads=1).batches(0)
    next(batches)
    time.sleep(0.3)
    ahead = len(counting.seen)
    batches.close()
    assert 2 <= ahead <= 22 < 53


def test_small_images_get_one_thread_and_processes_share_the_processors(records, tmp_path, monkeypatch):
    assert default_threads(records) == loader(records).threads == 1
    large = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pack_of_large = write_pack(tmp_path / "large.rec", [png(large)])
    assert default_threads(pack_of_large) == processors()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processors()))
    assert default_threads(pack_of_large) == processors()  # left over from something else
    monkeypatch.setenv("TRAINING_WORKER", "0")
    assert default_threads(pack_of_large) == 1


def test_waiting_is_measured(records):
    def slow(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        time.sleep(0.02)
        return image

    reader = loader(records, 4, threads=1, augment=slow)
    next(reader.batches(0))
    assert 0.06 < reader.wait_seconds < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 54}, "larger than the dataset"),
        ({"batch_size": 20, "num_parts": 3}, "batch of 60 is larger"),
        ({"num_parts": 2, "part_index": 2}, "part 2 of 2"),
        ({"threads": 0}, "threads"),
    ],
)
def test_arguments_that_cannot_work_are_refused(records, options, message):
    with pytest.raises(UsageError, match=message):
        loader(records, **options)


def test_positions_outside_the_epoch_are_refused(records):
    for epoch, start in ((0, 8), (0, -1), (-1, 0)):
        with pytest.raises(UsageError, match="7 batches"):
            loader(records).batches(epoch, start)


def test_first_of_several_labels_is_the_class(tmp_path):
    labels = [np.array([index + 3, 9], np.float32) for index in range(4)]
    records = write_pack(tmp_path / "several.rec", [png(picture(i)) for i in range(4)], labels)
    assert next(loader(records, 4, shuffle=False).batches(0)).labels.tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -2.0, 1e20])
def test_labels_that_are_no_classes_are_named(tmp_path, label):
    records = write_pack(tmp_path / "label.rec", [png(picture(i)) for i in range(4)], [0.0, 1.0, label, 3.0])
    with pytest.raises(UsageError, match="record 2 .*label .* is no class"):
        list(loader(records, 4).batches(0))


SCRIPT = """
import sys, time
from data_prep.recordio import RecordFile
from training.loader import Loader

def slow(image, rng):
    time.sleep(0.01)
    return image

batches = Loader(RecordFile(sys.argv[1]), 8, (3, 24, 24), augment=slow, threads=4).batches(0)
next(batches)
print("ready", flush=True)
{}
"""


@pytest.mark.parametrize("end", ["interrupt", "exception"])
def test_the_process_ends_with_its_main_thread(records, end):
    script = SCRIPT.format("time.sleep(60)" if end == "interrupt" else "raise RuntimeError('main is dead')")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(records.path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests that run in a shell's background have Ctrl-C switched off, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGINT if end == "interrupt" else 1)
    assert errors.count(b"Traceback") == 1


def test_measuring_the_loader_alone(records):
    figures = measure_loader(loader(records, 8), seconds=0.2)
    assert figures.images > 53  # goes on into further epochs
    assert figures.seconds >= 0.2
    assert figures.images_per_second == figures.images / figures.seconds
    text = describe(figures._replace(images=3000, seconds=2.0), device_speed=400)
    assert "1,500 images/s" in text
    assert "3.8 devices" in text
    assert "400 images/s" in text
    assert "3,000 images of 24 x 24 pixels in 2.0 s, batches of 8, 1 thread)" in text


def test_report_of_the_loader(records, capsys):
    assert report_io(loader(records, 8), device_speed=50, seconds=0.05) == 0
    assert "devices of 50 images/s (the given speed)" in capsys.readouterr().out
    with pytest.raises(UsageError, match="add --test-io"):
        parse_args(["--device-speed", "400"])


def test_measuring_a_pack_without_images_ends(tmp_path):
    records = damaged_pack(tmp_path / "bad.rec", tuple(range(8)), count=8)
    with pytest.raises(UsageError, match="no image of it decodes"):
        measure_loader(loader(records, 4, skip_bad=True), seconds=0.05)
