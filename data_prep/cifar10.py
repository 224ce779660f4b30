"""CIFAR-10 as packs, from its binary or its Python archive or the folder that one of them unpacks to.

Pictures are PNGs of 32 x 32 pixels. A record's key and id are the picture's place in the batches, one after the other.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from command_line import HelpFormatter, Parser
from data_prep.lists import CLASSES_FILE, write_classes
from data_prep.png import encode_png
from data_prep.progress import progress
from data_prep.recordio import Header, RecordWriter, pack
from data_prep.workers import chunked, default_workers, ordered_map
from errors import UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_CHUNK = 64
# All that the original pickles of arrays need: nothing in them can call anything else.
_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, numbers, strings and containers; a foreign file cannot run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of pictures")
        return super().find_class(module, name)


def read_binary(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, 3, 32, 32), labels (N,)) of a binary batch: a byte label, then the planes, a picture."""
    if not data or len(data) % (1 + _PIXELS):
        raise UsageError(f"{name}: {len(data)} bytes are no whole number of CIFAR-10 pictures; cut off?")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:].reshape(-1, *_SHAPE), rows[:, 0]


def read_python(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a Python batch: a pickled dictionary with b"data" (N, 3072) and b"labels"."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8).reshape(-1, *_SHAPE)
        labels = np.asarray(batch[b"labels"], np.int64)
    except Exception as error:
        # Damaged pickles raise whatever their bytes happen to mean.
        raise UsageError(f"{name}: not a batch of CIFAR-10 ({error})") from None
    if len(images) != len(labels) or not len(labels):
        raise UsageError(f"{name}: {len(images)} pictures with {len(labels)} labels")
    return images, labels


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file of the archive or folder `source`, one at a time."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path.name, path.read_bytes()
        return
    try:
        with tarfile.open(source, "r:*") as archive:
            for member in archive:
                if member.isreg():
                    yield Path(member.name).name, archive.extractfile(member).read()
    except FileNotFoundError:
        raise UsageError(f"{source}: no such file") from None
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        # Of an unknown compression the message lists all that were tried, a line each.
        cause = str(error).partition(":\n")[0]
        raise UsageError(f"{source}: cannot be read: {cause}; is it the archive?") from None


def read_batches(source: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Batch name -> (images, labels); UsageError names a batch that is missing or damaged."""
    wanted = [name for names in BATCHES.values() for name in names]
    found = {}
    for name, data in read_files(source):
        stem = name[: -len(".bin")] if name.endswith(".bin") else name
        if stem in wanted:
            where = f"{source}: {name}"
            found[stem] = (read_binary if stem != name else read_python)(data, where)
            if not 0 <= found[stem][1].min() <= found[stem][1].max() < len(CLASSES):
                raise UsageError(f"{where}: a label outside 0 to {len(CLASSES) - 1}")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UsageError(f"{source}: lacks {', '.join(missing)}; is it the whole CIFAR-10 archive?")
    return found


def _encode_chunk(images: list[np.ndarray]) -> list[bytes]:
    return [encode_png(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]


def build(source: Path, output: Path, workers: int) -> None:
    """Write train and val packs and the names of the classes into the folder `output`."""
    batches = read_batches(source)
    output.mkdir(parents=True, exist_ok=True)
    for pack_name, names in BATCHES.items():
        images = np.concatenate([batches[name][0] for name in names])
        labels = np.concatenate([batches[name][1] for name in names])
        encoded = (png for chunk in ordered_map(_encode_chunk, chunked(images, _CHUNK), workers) for png in chunk)
        with RecordWriter(output / f"{pack_name}.rec") as writer:
            for key, (png, label) in enumerate(zip(progress(encoded, pack_name, len(labels)), labels)):
                writer.write(key, pack(Header(0, float(label), key), png))
    write_classes(output / CLASSES_FILE, list(CLASSES))


def main(argv: list[str] | None = None) -> int:
    """The command `cifar10`."""
    parser = Parser(
        "python -m data_prep cifar10", description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "source", type=Path, help="cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or the folder unpacked from it"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("data", "cifar10"), help="folder for the packs")
    parser.add_argument("--num-thread", type=int, default=default_workers(), help="worker processes")
    args = parser.parse_args(argv)
    build(args.source, args.output, args.num_thread)
    print(f"wrote {args.output}/train.rec and {args.output}/val.rec")
    return 0
