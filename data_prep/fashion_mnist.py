"""Fashion-MNIST as RecordIO packs: the full set, or the subset that is embedded in this project.

The subset is the first 600 pictures of every class of the training file and the first 100 of every class of
the test file, each in the order of its file, then shuffled by numpy's frozen RandomState with SHUFFLE_SEED. A
record's key is its place in the pack, its `id` the picture's place in the original file; pictures are grey
PNGs of 28 x 28 pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np

import atomic_file
from command_line import HelpFormatter, Parser
from data_prep.lists import CLASSES_FILE
from data_prep.png import encode_png
from data_prep.progress import progress
from data_prep.recordio import Header, RecordWriter, pack
from errors import ProjectError, UsageError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SHUFFLE_SEED = 20
# Pictures a class of the embedded subset, by pack.
DEMO_IMAGES = {"train": 600, "val": 100}

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
OFFICIAL_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_TIMEOUT_SECONDS = 60
_LICENSE = Path(__file__).with_name("fashion_mnist_license.txt")

# Pack -> (file of pictures, file of labels).
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the files' contents, not of the .gz: distributions compress them again.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(data: bytes, name: str) -> np.ndarray:
    """Array of uint8 in the idx format.

    Two zeros, type 8, number of dimensions, big-endian sizes, the values.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UsageError(f"{name}: not a file of bytes in the idx format")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(values) != np.prod(shape, dtype=np.int64):
        raise UsageError(f"{name}: holds {len(values)} values, its header says {' x '.join(map(str, shape))}")
    return values.reshape(shape)


def read_source(folder: Path, name: str) -> np.ndarray:
    """One of the four original files, from NAME.gz or NAME in `folder`; its checksum is verified."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)
    if path is None:
        raise UsageError(f"{folder / name}.gz: no such file; the four original files are needed")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != CHECKSUMS[name]:
        raise UsageError(f"{path}: not the original file of Fashion-MNIST (its content has another SHA-256)")
    return read_idx(data, str(path))


def find_source(source: Path | None, download_to: Path) -> Path:
    """Folder of the original files.

    `source`, or that of Debian's package, or `download_to` after a download.
    """
    if source is not None:
        if not source.is_dir():
            raise UsageError(f"{source}: no such folder")
        return source
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    for name in CHECKSUMS:
        if not (download_to / f"{name}.gz").exists():
            _download(f"{OFFICIAL_ADDRESS}/{name}.gz", download_to / f"{name}.gz", name)
    return download_to


def _download(address: str, path: Path, name: str) -> None:
    advice = "install Debian's package dataset-fashion-mnist or name a folder with --source"
    print(f"downloading {address}", flush=True)
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as answer:
            data = answer.read()
        content = gzip.decompress(data)
    except (OSError, EOFError, zlib.error, urllib.error.URLError) as error:
        raise ProjectError(f"{address}: the download failed ({error}); {advice}") from None
    if hashlib.sha256(content).hexdigest() != CHECKSUMS[name]:
        raise ProjectError(f"{address}: what was downloaded is not the original file (SHA-256); {advice}")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file.write_bytes(path, data)


def demo_selection(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Places, in the original file and in the order of the pack, of the pictures of the embedded subset."""
    first = [np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]
    return np.random.RandomState(SHUFFLE_SEED).permutation(np.sort(np.concatenate(first)))


def write_pack(path: Path, images: np.ndarray, labels: np.ndarray, selection: np.ndarray) -> None:
    """Pack images (N, 28, 28) and labels (N,) at the places `selection`, in its order."""
    with RecordWriter(path) as writer:
        for key, place in enumerate(progress(selection, path.name)):
            header = Header(0, float(labels[place]), int(place))
            writer.write(key, pack(header, encode_png(images[place])))


def build(output: Path, source: Path | None = None, demo: bool = False) -> None:
    """Write train and val packs, class names and the licence's notice into the folder `output`."""
    folder = find_source(source, output / "original")
    output.mkdir(parents=True, exist_ok=True)
    for name, (image_file, label_file) in FILES.items():
        images, labels = read_source(folder, image_file), read_source(folder, label_file)
        selection = demo_selection(labels, DEMO_IMAGES[name]) if demo else np.arange(len(labels))
        write_pack(output / f"{name}.rec", images, labels, selection)
    atomic_file.write_text(output / CLASSES_FILE, "".join(f"{name}\n" for name in CLASSES))
    atomic_file.write_bytes(output / "LICENSE", _LICENSE.read_bytes())


def main(argv: list[str] | None = None) -> int:
    """The command `fashion-mnist`."""
    parser = Parser(
        "python -m data_prep fashion-mnist", description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="folder to write; data/demo or data/fashion-mnist")
    parser.add_argument("--demo", action="store_true", help="the embedded subset instead of all 70,000 pictures")
    parser.add_argument(
        "--source", type=Path,
        help=f"folder of the four original .gz files; unset: {DEBIAN_FOLDER} (Debian's package "
        "dataset-fashion-mnist), else a download",
    )  # fmt: skip
    args = parser.parse_args(argv)
    output = args.output or Path("data", "demo" if args.demo else "fashion-mnist")
    build(output, args.source, args.demo)
    print(f"wrote {output}/train.rec and {output}/val.rec")
    return 0
