"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os

# Fixed before MXNet or PyTorch is imported: bit-exact results need a fixed number of threads, and the networks of
# the tests are so small that more than one only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.recordio import Header, RecordWriter, pack

ROOT = Path(__file__).resolve().parent.parent
TINY_SIZE = 16
TINY_CLASSES = 3
TINY_IMAGES = 84  # not a multiple of the tests' batch size of 16: the last batch is padded


def tiny_image(label: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with one bright channel, which is the class: learnable within a few updates."""
    image = rng.integers(0, 120, (TINY_SIZE, TINY_SIZE, 3), dtype=np.uint8)
    image[:, :, label % 3] += 100
    return image


def write_pack(path: Path, labels: list[int], seed: int = 0) -> None:
    """A pack of tiny PNG images with these labels."""
    rng = np.random.default_rng(seed)
    with RecordWriter(path) as writer:
        for index, label in enumerate(labels):
            png = cv2.imencode(".png", tiny_image(label, rng))[1].tobytes()
            writer.write(index, pack(Header(0, float(label), index, 0), png))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with train.rec and val.rec of three classes."""
    folder = tmp_path_factory.mktemp("tiny")
    write_pack(folder / "train.rec", [i % TINY_CLASSES for i in range(TINY_IMAGES)])
    write_pack(folder / "val.rec", [i % TINY_CLASSES for i in range(30)], seed=1)
    return folder


@pytest.fixture
def train_flags(tiny_data, tmp_path):
    """Builds the flags of a small, quick run; keyword arguments replace or add flags (True: no value)."""

    def build(name: str = "run", **changes) -> list[str]:
        flags = {
            "data_type": "demo", "depth": 8, "image_size": TINY_SIZE, "data_dir": tiny_data, "batch_size": 16,
            "epochs": 3, "lr": 0.02, "lr_steps": "2", "frequent": 2, "pad": 2,
            "model_prefix": tmp_path / "model" / name, "log_dir": tmp_path / "log" / name,
        }  # fmt: skip
        flags.update(changes)
        argv = []
        for flag, value in flags.items():
            if value is not None and value is not False:
                argv += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return argv

    return build


@pytest.fixture
def train():
    """Runs the training command in this process; returns its exit status."""
    from errors import run_command
    from train_se_resnext import main

    def run(argv: list[str]) -> int:
        try:
            return run_command(lambda: main(argv))
        except SystemExit as error:
            return error.code

    return run


def start_training(argv: list[str], threads: int = 1, **options) -> subprocess.Popen:
    """The training command as a process of its own, with so many threads for an operator."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "train_se_resnext.py", *argv], cwd=ROOT, env=environment, **options)


def read_lines(log_dir: Path) -> list[dict]:
    """run.jsonl as a list."""
    return [json.loads(line) for line in (Path(log_dir) / "run.jsonl").read_text().splitlines()]


@pytest.fixture
def file_size_limit():
    """`with file_size_limit(size):` lets no file grow beyond that many bytes, as a full disk would.

    The limit ends with the block and not with the test: pytest writes to its own output in between, which may be a
    file larger than that.
    """

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit


TIMES = ("time", "elapsed", "seconds", "images_per_second", "data_wait", "peak_memory")


def without_times(lines: list[dict]) -> list[dict]:
    """Log lines without what the machine's clock and memory decide, and without the flags that name places."""
    kept = []
    for line in lines:
        line = {key: value for key, value in line.items() if key not in TIMES}
        line.pop("arguments", None)
        kept.append(line)
    return kept
