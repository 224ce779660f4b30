"""The loader against `mx.io.ImageRecordIter`, and both against bare libjpeg-turbo decoding.

One pack of photograph-like JPEGs, random-resized crop (area 8 to 100 %, aspect 3/4 to 4/3) to 224 pixels and mirror,
uint8 out. Every measurement is a process of its own; the contenders alternate, round by round. ImageRecordIter first
tries several numbers of threads and then runs with its best, in whichever of its kinds (uint8, float32) is faster.

After that the loader alone with other pictures and augmentations.

    python -m benchmarks.loader
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks._pictures import synthetic_photograph
from command_line import HelpFormatter

CROP = 224
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
# Batches before the clock starts: start-up, and what was prefetched during it.
WARM_BATCHES = 4
CONTENDERS = ("loader", "mxnet-uint8", "mxnet-float32", "decode")


def make_pack(path: Path, images: int, size: int, quality: int) -> float:
    """Write a pack of `images` square JPEGs (4:2:0); returns their mean size in KB."""
    import simplejpeg

    from data_prep.recordio import Header, RecordWriter, pack

    rng, total = np.random.default_rng(0), 0
    with RecordWriter(path) as writer:
        for index in range(images):
            picture = synthetic_photograph(rng, size, size)
            data = simplejpeg.encode_jpeg(picture, quality=quality, colorspace="RGB", colorsubsampling="420")
            total += len(data)
            writer.write(index, pack(Header(0, float(index % 1000), index), data))
    return total / images / 1000


def loader_batches(path: Path, threads: int, batch_size: int) -> Iterator[int]:
    """Images of each batch, two epochs of our loader."""
    from data_prep.recordio import RecordFile
    from training.augment import AugmentOptions, train_augmenter
    from training.loader import Loader

    options = AugmentOptions(CROP, aug_level=1, min_random_area=AREA[0], max_random_area=AREA[1])
    loader = Loader(RecordFile(path), batch_size, (3, CROP, CROP), augment=train_augmenter(options), threads=threads)
    for epoch in range(2):
        for batch in loader.batches(epoch):
            yield batch.valid


def mxnet_batches(path: Path, threads: int, batch_size: int, kind: str) -> Iterator[int]:
    """Images of each batch, two epochs of MXNet's iterator with the same augmentation."""
    from mxnet_compat import mx

    iterator = (mx.io.ImageRecordUInt8Iter if kind == "uint8" else mx.io.ImageRecordIter)(
        path_imgrec=str(path), path_imgidx=str(path.with_suffix(".idx")), data_shape=(3, CROP, CROP),
        batch_size=batch_size, shuffle=True, preprocess_threads=threads, verbose=False,
        random_resized_crop=True, min_random_area=AREA[0], max_random_area=AREA[1],
        min_aspect_ratio=ASPECT[0], max_aspect_ratio=ASPECT[1], rand_mirror=True,
    )  # fmt: skip
    for _ in range(2):
        for batch in iterator:
            batch.data[0].wait_to_read()
            yield batch_size - batch.pad
        iterator.reset()


def decode_batches(path: Path, threads: int, batch_size: int) -> Iterator[int]:
    """Images of each batch, two epochs of nothing but reading and libjpeg-turbo's decoding of whole pictures."""
    import simplejpeg

    from data_prep.recordio import RecordFile

    records = RecordFile(path)

    def decode(chunk: range) -> int:
        buffer = np.empty(1 << 22, np.uint8)
        for index in chunk:
            simplejpeg.decode_jpeg(records.unpack(index)[1], buffer=buffer)
        return len(chunk)

    chunks = [range(start, min(start + batch_size, len(records))) for start in range(0, len(records), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(decode, chunks * 2)


def measure(contender: str, path: Path, threads: int, batch_size: int) -> float:
    """Images/s from the end of the warm batches to the end of the second epoch."""
    if contender == "loader":
        batches = loader_batches(path, threads, batch_size)
    elif contender == "decode":
        batches = decode_batches(path, threads, batch_size)
    else:
        batches = mxnet_batches(path, threads, batch_size, contender.split("-")[1])
    for _ in range(WARM_BATCHES):
        next(batches)
    begin = time.perf_counter()
    images = sum(batches)
    return images / (time.perf_counter() - begin)


def measure_apart(contender: str, path: Path, threads: int, batch_size: int) -> float:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader", "--measure", contender, "--pack", str(path)]
    command += ["--threads", str(threads), "--batch-size", str(batch_size)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def best_of_mxnet(path: Path, batch_size: int, threads: int) -> tuple[str, int]:
    """MXNet's fastest kind of iterator and number of threads, of 1 to twice the processors, two runs each."""
    trials = [(kind, count) for kind in CONTENDERS[1:3] for count in sorted({1, threads, threads + 1, 2 * threads})]
    speeds = {trial: max(measure_apart(trial[0], path, trial[1], batch_size) for _ in range(2)) for trial in trials}
    for (kind, count), speed in speeds.items():
        print(f"  {kind}, {count} threads: {speed:,.0f} images/s", flush=True)
    return max(speeds, key=speeds.get)


def compare(args: argparse.Namespace, path: Path) -> None:
    print("ImageRecordIter's threads:", flush=True)
    kind, mxnet_threads = best_of_mxnet(path, args.batch_size, args.threads)
    contenders = [("loader", args.threads), (kind, mxnet_threads), ("decode", args.threads)]
    speeds: dict[str, list[float]] = {name: [] for name, _ in contenders}
    for number in range(args.rounds):
        for name, threads in contenders:
            speeds[name].append(measure_apart(name, path, threads, args.batch_size))
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {runs[-1]:,.0f}" for name, runs in speeds.items()), flush=True
        )
    for name, threads in contenders:
        runs = speeds[name]
        median = statistics.median(runs)
        print(f"{name}, {threads} threads: median {median:,.0f} images/s ({min(runs):,.0f} to {max(runs):,.0f})")
    ratios = [ours / theirs for ours, theirs in zip(speeds["loader"], speeds[kind])]
    fractions = [ours / bare for ours, bare in zip(speeds["loader"], speeds["decode"])]
    print(f"loader / ImageRecordIter: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"loader / bare decoding: median {statistics.median(fractions):.0%}")


def loader_alone(folder: Path, threads: int, batch_size: int, seconds: float = 3.0) -> None:
    """Images/s of our loader with other pictures and augmentations."""
    import cv2

    from data_prep.recordio import Header, RecordFile, RecordWriter, pack
    from training.augment import AugmentOptions, train_augmenter
    from training.loader import Loader
    from training.loader_speed import measure_loader

    photographs, large, small = (folder / name for name in ("pictures.rec", "large.rec", "small.rec"))
    make_pack(large, 300, 512, 95)
    rng = np.random.default_rng(0)
    with RecordWriter(small) as writer:
        for index in range(3000):
            picture = cv2.cvtColor(synthetic_photograph(rng, 28, 28), cv2.COLOR_RGB2GRAY)
            writer.write(index, pack(Header(0, float(index % 10), index), cv2.imencode(".png", picture)[1].tobytes()))
    rows = [("256 px JPEG", photographs, AugmentOptions(CROP, aug_level=level)) for level in (1, 2, 3)]
    rows.append(("512 px JPEG", large, AugmentOptions(CROP, min_random_area=AREA[0])))
    rows.append(("28 px PNG", small, AugmentOptions(28, pad=2)))
    for name, path, options in rows:
        shape = (3, options.image_size, options.image_size)
        loader = Loader(RecordFile(path), batch_size, shape, augment=train_augmenter(options), threads=threads)
        measure_loader(loader, seconds / 3)
        processor = time.process_time()
        figures = measure_loader(loader, seconds)
        spent = (time.process_time() - processor) / figures.images
        crop = "random-resized crop" if options.random_resized else "random crop"
        print(
            f"loader alone, {name}, level {options.aug_level}, {crop} to {options.image_size}: "
            f"{figures.images_per_second:,.0f} images/s, {spent * 1e6:,.0f} us of processor time an image"
        )


def main() -> int:
    from training.loader import processors

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="pictures in the pack")
    parser.add_argument("--size", type=int, default=256, help="their height and width in pixels")
    parser.add_argument("--quality", type=int, default=95, help="their JPEG quality")
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of alternating runs")
    parser.add_argument("--threads", type=int, default=processors(), help="threads of the loader and of bare decoding")
    parser.add_argument("--pack", type=Path, default=None, help="measure with this pack instead of a made one")
    parser.add_argument("--measure", choices=CONTENDERS, default=None, help="one measurement only, printed alone")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.pack, args.threads, args.batch_size)))
    elif args.pack:
        compare(args, args.pack)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pictures.rec"
            kilobytes = make_pack(path, args.images, args.size, args.quality)
            print(f"{args.images} JPEGs of {args.size} x {args.size} pixels, {kilobytes:.1f} KB each", flush=True)
            compare(args, path)
            loader_alone(Path(folder), args.threads, args.batch_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
