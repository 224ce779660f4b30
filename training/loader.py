"""Batches from a RecordIO pack: decoded and augmented by a pool of threads, the same bits for any number of them.

`(seed, epoch, sample index)` decides everything random about a sample: its place in the order and its augmentation.
No thread keeps state from one sample to the next, so neither their number nor their timing can be seen in a batch, and
any batch of any epoch can be the first one that is read.

While batches are read OpenCV's own threads are switched off for the process: samples are the better unit of work.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Callable
from weakref import WeakSet

import cv2
import numpy as np

from data_prep.decode import DecodeError, Scratch, decode_image, image_size, reduction
from data_prep.recordio import Header, RecordError, RecordFile
from engines.base import IGNORED_LABEL, Batch
from errors import OptionError, ProjectError, UsageError
from training.augment import Augmenter
from training.heartbeat import local_processes
from training.launch_processes import processors

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Samples that one thread takes at once: enough to make the handing over cheap, few enough to share a batch well.
_CHUNK = 16
# Batches in work or waiting while the consumer has one; more are in work where they are too small for all threads.
_BATCHES_AHEAD = 3
# Below this mean size of a record Python's share of the work outweighs decoding, and a second thread, waiting for the
# interpreter, doubles the processor time for no more images/s.
_SMALL_RECORD = 4096
# What a stream of random numbers is for; part of the seed, so that order and augmentation are independent.
_ORDER, _AUGMENTATION = 0, 1


def default_threads(records: RecordFile) -> int:
    """One a processor, or a single one where the images are too small to gain from more.

    Processes that train together on this machine share its processors.
    """
    small = records.path.stat().st_size < _SMALL_RECORD * len(records)
    return 1 if small else max(1, processors() // local_processes())


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..samples-1, int64, that is trained on in an epoch."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(samples)


def augmentation_key(seed: int, epoch: int) -> np.ndarray:
    """Key of the epoch's family of random streams, one a sample: uint64 (2,)."""
    return np.random.SeedSequence([seed, epoch, _AUGMENTATION]).generate_state(2, np.uint64)


def sample_rng(key: np.ndarray, index: int) -> np.random.Generator:
    """The random stream of one sample in one epoch; Philox streams with different counters never meet."""
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, index], key=key))


def part_of_step(order: np.ndarray, step: int, batch_size: int, num_parts: int, part_index: int) -> np.ndarray:
    """Sample indices of one part's batch, at most `batch_size`.

    Step by step the parts cut up `num_parts * batch_size` samples of the common order, so that together they train on
    what one part with the whole batch would. What remains for the last step is shared evenly: a part may get fewer
    than the others by one there, and none where fewer samples than parts remain.
    """
    group = order[step * batch_size * num_parts : (step + 1) * batch_size * num_parts]
    return np.array_split(group, num_parts)[part_index]


def _class_of(header: Header) -> int:
    """The class that an image record's (first) label names."""
    label = header.label[0] if header.flag else header.label
    if not IGNORED_LABEL <= label <= np.iinfo(np.int32).max:
        raise RecordError(f"the label {label} is no class")
    return int(label)


@dataclass
class _Job:
    """A batch in work. `rows` are the samples to decode; `valid` of them count (none does in an empty part)."""

    rows: np.ndarray
    valid: int
    images: np.ndarray
    labels: np.ndarray
    key: np.ndarray
    chunks: list[Future] = field(default_factory=list)


class Loader:
    """Batches of an epoch from a pack, in a fixed order.

    records: the pack; a record's (first) label is its class. batch_size: images in a batch of this part.
    image_shape: (3, H, W). augment: called with (uint8 (h, w, 3) RGB image, its generator), returns uint8 (H, W, 3);
    None where all images have the right size. shuffle: a permutation of the whole set for every epoch, else the
    order of the pack. threads: None for `default_threads`. num_parts, part_index: this process gets its share of each
    step, see `part_of_step`. skip_bad: leave out images that do not decode instead of raising; the rest of their
    batch moves up and padding rows take their places.

    Raises OptionError (a UsageError) for arguments that cannot work.
    """

    def __init__(
        self,
        records: RecordFile,
        batch_size: int,
        image_shape: tuple[int, int, int],
        *,
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = True,
        threads: int | None = None,
        num_parts: int = 1,
        part_index: int = 0,
        skip_bad: bool = False,
    ) -> None:
        if batch_size < 1:
            raise OptionError(f"batch size {batch_size}: it must be at least 1")
        if len(image_shape) != 3 or image_shape[0] != 3 or min(image_shape) < 1:
            raise OptionError(f"image shape {tuple(image_shape)}: expected (3, height, width)")
        if not 0 <= part_index < num_parts:
            raise OptionError(f"part {part_index} of {num_parts}: parts count from 0 to {num_parts - 1}")
        if threads is not None and threads < 1:
            raise OptionError(f"{threads} loader threads: at least 1 is needed")
        if not len(records):
            raise UsageError(f"{records.path}: the pack holds no images")
        if shuffle and batch_size * num_parts > len(records):
            raise UsageError(
                f"{records.path}: a batch of {batch_size * num_parts} is larger than the dataset "
                f"({len(records)} images); lower --batch-size"
            )
        self.records, self.batch_size, self.image_shape = records, batch_size, tuple(image_shape)
        self.seed, self.augment, self.shuffle, self.skip_bad = seed, augment, shuffle, skip_bad
        self.threads = threads or default_threads(records)
        self.num_parts, self.part_index = num_parts, part_index
        self.wait_seconds = 0.0
        self.skipped = 0
        self._per_thread = threading.local()
        self._pools: WeakSet[ThreadPoolExecutor] = WeakSet()
        self._closed = False

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same for every part."""
        return -(-len(self.records) // (self.batch_size * self.num_parts))

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Batches `start_batch`, `start_batch` + 1, ... of an epoch; the ones before are not read.

        Rows that are missing from the last batch (or were left out as bad) are filled up with repeats, which `pad`
        counts. The arrays belong to the caller. The first `next` starts the threads; they end with the iteration,
        however it ends. Raises UsageError naming file, record and offset for an image that does not decode.
        """
        if epoch < 0 or not 0 <= start_batch <= self.steps_per_epoch:
            raise OptionError(f"epoch {epoch}, batch {start_batch}: an epoch has {self.steps_per_epoch} batches")
        return self._iterate(epoch, start_batch)

    def close(self) -> None:
        """End all iterations and their threads; the pack stays open, it belongs to the caller."""
        self._closed = True
        for pool in list(self._pools):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ the consumer's side

    def _iterate(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        cv2.setNumThreads(1)
        samples = len(self.records)
        order = epoch_order(samples, self.seed, epoch) if self.shuffle else np.arange(samples)
        key = augmentation_key(self.seed, epoch)
        # The pool also ends, by the interpreter's own care, when the main thread ends with an iteration unfinished.
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix=f"loader-{id(self):x}")
        self._pools.add(pool)
        steps = iter(range(start_batch, self.steps_per_epoch))
        pending: deque[_Job] = deque()
        try:
            for step in islice(steps, self._batches_ahead()):
                pending.append(self._submit(pool, order, step, key))
            while pending:
                batch = self._collect(pending.popleft())
                for step in islice(steps, 1):
                    pending.append(self._submit(pool, order, step, key))
                yield batch
        finally:
            # The garbage collector may end us inside one of the pool's own threads, which cannot wait for itself.
            own_thread = threading.current_thread().name.startswith(f"loader-{id(self):x}")
            pool.shutdown(wait=not own_thread, cancel_futures=True)

    def _batches_ahead(self) -> int:
        in_work = -(-self.threads * _CHUNK // self.batch_size)
        return max(_BATCHES_AHEAD, in_work + 1)

    def _submit(self, pool: ThreadPoolExecutor, order: np.ndarray, step: int, key: np.ndarray) -> _Job:
        if self._closed:
            raise self._closed_error()
        rows = part_of_step(order, step, self.batch_size, self.num_parts, self.part_index)
        images = np.empty((self.batch_size, *self.image_shape), np.uint8)
        # An empty part still needs pixels to repeat.
        job = _Job(rows if len(rows) else order[:1], len(rows), images, np.zeros(self.batch_size, np.int64), key)
        for start in range(0, len(job.rows), _CHUNK):
            job.chunks.append(pool.submit(self._fill, job, start, min(start + _CHUNK, len(job.rows))))
        return job

    def _collect(self, job: _Job) -> Batch:
        """Wait for a batch, then put repeats where rows are missing."""
        begin = time.perf_counter()
        try:
            bad = [row for chunk in job.chunks for row in chunk.result()]
        except CancelledError:
            raise self._closed_error() from None
        finally:
            self.wait_seconds += time.perf_counter() - begin
        good = np.delete(np.arange(len(job.rows)), bad)
        valid = min(len(good), job.valid)
        self.skipped += job.valid - valid
        if valid == self.batch_size:
            return Batch(job.images, job.labels, 0)
        if not len(good):
            return Batch(np.zeros_like(job.images), np.zeros_like(job.labels), self.batch_size)
        rows = np.resize(good, self.batch_size)
        return Batch(job.images[rows], job.labels[rows], self.batch_size - valid)

    def _closed_error(self) -> ProjectError:
        return ProjectError(f"{self.records.path}: the loader was closed while its batches were being read")

    # ------------------------------------------------------------------------------------------- the threads' side

    def _fill(self, job: _Job, start: int, stop: int) -> list[int]:
        """Load rows `start` to `stop` of a batch into its arrays; returns the bad ones."""
        bad = []
        for row in range(start, stop):
            index = int(job.rows[row])
            try:
                job.labels[row] = self._load(index, sample_rng(job.key, index), job.images[row])
            except (DecodeError, RecordError) as error:
                if not self.skip_bad:
                    raise self._bad_image(index, error) from None
                bad.append(row)
        return bad

    def _bad_image(self, index: int, error: Exception) -> UsageError:
        where = self.records.where(index)
        reason = str(error).removeprefix(f"{where}: ")
        return UsageError(
            f"{where} (key {self.records.keys[index]}): {reason}; "
            f"--skip-bad leaves such images out, `python -m data_prep verify {self.records.path}` lists them"
        )

    def _load(self, index: int, rng: np.random.Generator, out: np.ndarray) -> int:
        """Decode and augment a sample into `out`, uint8 (3, H, W); returns its class."""
        header, data = self.records.unpack(index)
        label = _class_of(header)
        try:
            image = self._pixels(data, rng)
            if image.shape != (*self.image_shape[1:], 3) or image.dtype != np.uint8:
                raise ProjectError(
                    f"{self.records.where(index)}: the image is {image.dtype} {image.shape} after augmentation, "
                    f"not uint8 {(*self.image_shape[1:], 3)}"
                )
            # Writes the planes in place, many times faster than a transposing copy.
            cv2.split(image, list(out))
        except ProjectError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise ProjectError(f"{self.records.where(index)}: augmentation failed: {kind}: {error}") from error
        return label

    def _pixels(self, data: memoryview, rng: np.random.Generator) -> np.ndarray:
        """The augmented image; it may lie in the thread's scratch memory, which the next one overwrites."""
        scratch = self._scratch()
        if self.augment is None:
            return decode_image(data, scratch=scratch)
        size = image_size(data) if isinstance(self.augment, Augmenter) else None
        if size is None:
            return self.augment(decode_image(data, scratch=scratch), rng)
        window = self.augment.window(*size, rng)
        reduced = reduction(window.height, window.width, window.out_height, window.out_width)
        return self.augment.finish(decode_image(data, reduced, scratch), window, rng, reduced)

    def _scratch(self) -> Scratch:
        if not hasattr(self._per_thread, "scratch"):
            self._per_thread.scratch = Scratch()
        return self._per_thread.scratch
