"""A list of images -> a pack: worker processes convert, this process writes in the order of the list.

Beside PREFIX.rec and PREFIX.idx stand PREFIX.rejected.tsv (images left out, with the reason) and
PREFIX.pack.json (the list's checksum and the options). While work goes on the first three end in `.part`, and
are what a resumed run continues.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import atomic_file
from command_line import counted
from data_prep.conversion import Conversion
from data_prep.lists import Item, check_list, read_list
from data_prep.progress import Counter
from data_prep.recordio import Header, RecordWriter, index_path_of, pack, partial_records
from data_prep.sources import SourceError, read_source
from data_prep.workers import chunked, ordered_map
from errors import ProjectError, UsageError

_CHUNK = 16
# So many failures before the first success: the root folder is wrong, not the images.
_HOPELESS = 100


@dataclass
class Packed:
    """Outcome of packing one list.

    Records written, images left out, and how many of both an earlier run had done.
    """

    path: Path
    written: int = 0
    rejected: int = 0
    resumed: int = 0


def pack_list(
    list_path: Path,
    root: Path,
    conversion: Conversion,
    *,
    all_labels: bool = True,
    workers: int = 1,
    resume: bool = False,
) -> Packed:
    """Pack the images of `list_path`, whose paths are relative to `root`, beside the list.

    all_labels: store all labels of an image that has several, else its first. An image that does not decode
    completely is left out. resume: continue what an interrupted run of the same list and options left, or do
    nothing when it had finished. Raises ProjectError when no image could be packed, the disk is full or a
    worker dies.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    total = check_list(list_path)
    job = _Job(list_path, conversion, all_labels)
    if resume:
        finished = job.finished()
        if finished is not None:
            return finished
        job.check_resumable()
    rejected_end, ends, packed = job.progress_so_far() if resume else (0, (0, 0), Packed(job.record_path))
    job.write_manifest(None)
    worker = functools.partial(_convert_chunk, str(root), conversion, all_labels)
    items = islice(read_list(list_path), packed.written + packed.rejected, None)
    with (
        RecordWriter(job.record_path, keep_partial=True, start=ends) as writer,
        _Rejections(job.rejected_path, rejected_end) as rejections,
    ):
        counter = Counter(job.record_path.name, total, done=packed.resumed)
        try:
            for results in ordered_map(worker, chunked(items, _CHUNK), workers):
                for key, path, payload, reason in results:
                    _take(writer, rejections, packed, key, path, payload, reason)
                _keep(writer.flush)
                counter.add(len(results))
        finally:
            counter.close()
        if not packed.written:
            raise ProjectError(f"{list_path}: none of its {total} images can be packed; see {rejections.path}")
    job.write_manifest(packed)
    return packed


def _take(
    writer: RecordWriter,
    rejections: _Rejections,
    packed: Packed,
    key: int,
    path: str,
    payload: bytes | None,
    reason: str,
) -> None:
    """Write one record, or the reason why there is none."""
    if payload is not None:
        _keep(writer.write, key, payload)
        packed.written += 1
        return
    rejections.add(key, path, reason)
    packed.rejected += 1
    if not packed.written and packed.rejected >= _HOPELESS:
        raise UsageError(f"none of the first {_HOPELESS} images can be packed ({path}: {reason}): wrong folder?")


def _keep(write: Callable, *arguments: object) -> None:
    """Write, and say in case of failure what can be done about it."""
    try:
        write(*arguments)
    except ProjectError as error:
        raise ProjectError(f"{error}; what is packed is kept: go on with --resume") from None


def _convert_chunk(
    root: str, conversion: Conversion, all_labels: bool, items: list[Item]
) -> list[tuple[int, str, bytes | None, str]]:
    """(key, path, payload or None, reason) for every item; runs in the workers."""
    # Only the workers need the image libraries; the time to load them counts double on a few thousand images.
    from data_prep.decode import DecodeError
    from data_prep.images import convert

    results = []
    for item in items:
        try:
            image = convert(read_source(root, item.path), conversion)
        except (DecodeError, SourceError) as error:
            results.append((item.key, item.path, None, str(error)))
            continue
        label = item.labels if all_labels and len(item.labels) > 1 else item.labels[0]
        results.append((item.key, item.path, pack(Header(0, label, item.key), image), ""))
    return results


class _Rejections:
    """The file of images left out: a line `index TAB path TAB reason` each, kept only when there is one."""

    def __init__(self, final: Path, start: int) -> None:
        self.final, self.path = final, Path(f"{final}.part")
        try:
            self._file = open(self.path, "r+b" if start else "wb")  # noqa: SIM115 - closed by __exit__
            self._file.truncate(start)
            self._file.seek(start)
        except OSError as error:
            raise ProjectError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._empty = not start

    def add(self, key: int, path: str, reason: str) -> None:
        line = f"{key}\t{path}\t{' '.join(reason.split())}\n"
        try:
            self._file.write(line.encode("utf-8", "surrogateescape"))
            # At once: a resumed run takes an image that is neither packed nor listed here for not done.
            self._file.flush()
        except OSError as error:
            raise ProjectError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._empty = False

    def __enter__(self) -> _Rejections:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if kind is not None:
            return
        if self._empty:
            self.path.unlink()
            self.final.unlink(missing_ok=True)
        else:
            os.replace(self.path, self.final)


class _Job:
    """Names of a pack's files, and what an earlier run has left in them."""

    def __init__(self, list_path: Path, conversion: Conversion, all_labels: bool) -> None:
        prefix = list_path.with_suffix("")
        self.list_path = list_path
        self.record_path = Path(f"{prefix}.rec")
        self.rejected_path = Path(f"{prefix}.rejected.tsv")
        self.manifest_path = Path(f"{prefix}.pack.json")
        digest = hashlib.sha256()
        with open(list_path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        self.made_of = {"list_sha256": digest.hexdigest(), "all_labels": all_labels, **asdict(conversion)}

    def write_manifest(self, packed: Packed | None) -> None:
        """Say what the pack is made of; with `packed`, that it is complete."""
        done = {"written": packed.written, "rejected": packed.rejected} if packed else None
        try:
            atomic_file.write_text(
                self.manifest_path, json.dumps({"made_of": self.made_of, "done": done}, indent=1) + "\n"
            )
        except OSError as error:
            raise ProjectError(f"{self.manifest_path}: cannot be written: {error.strerror}") from None

    def _read_manifest(self) -> tuple[dict, dict | None]:
        """What an earlier run made its pack of, and its outcome when it got to its end; ({}, None) when none did."""
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            # An option that did not exist then had the effect that its default has now.
            return {**asdict(Conversion()), **manifest["made_of"]}, manifest["done"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}, None

    def finished(self) -> Packed | None:
        """The outcome of an earlier run that packed the same list with the same options to its end."""
        made_of, done = self._read_manifest()
        if made_of != self.made_of or not done:
            return None
        if not (self.record_path.exists() and index_path_of(self.record_path).exists()):
            return None
        written, rejected = done["written"], done["rejected"]
        return Packed(self.record_path, written, rejected, written + rejected)

    def check_resumable(self) -> None:
        """Refuse to continue a pack that was begun with another list or other options."""
        if not Path(f"{self.record_path}.part").exists():
            return
        before, _ = self._read_manifest()
        changed = [name for name, value in self.made_of.items() if before.get(name) != value]
        if changed:
            raise UsageError(
                f"{self.record_path}.part was begun with another {' and '.join(changed)}: "
                "use the same again, or leave out --resume to start anew"
            )

    def progress_so_far(self) -> tuple[int, tuple[int, int], Packed]:
        """Ends of the rejections, of the pack and of its index, and counts, where the files agree with the list."""
        packed = Packed(self.record_path)
        records, rejections = partial_records(self.record_path), self._old_rejections()
        record, rejection = next(records, None), next(rejections, None)
        rejected_end, ends = 0, (0, 0)
        for item in read_list(self.list_path):
            if record is not None and record.key == item.key:
                ends = record.end, record.index_end
                packed.written += 1
                record = next(records, None)
            elif rejection is not None and rejection[0] == item.key:
                rejected_end = rejection[1]
                packed.rejected += 1
                rejection = next(rejections, None)
            else:
                break
        packed.resumed = packed.written + packed.rejected
        return rejected_end, ends, packed

    def _old_rejections(self) -> Iterator[tuple[int, int]]:
        """(index, end of its line) of the images that the interrupted run has left out."""
        path = Path(f"{self.rejected_path}.part")
        if not path.exists():
            return
        end = 0
        with open(path, "rb") as lines:
            for line in lines:
                key = line.split(b"\t", 1)[0]
                if not line.endswith(b"\n") or not key.isdigit():
                    return
                end += len(line)
                yield int(key), end


def report(outcomes: list[Packed], allowed: int) -> int:
    """Print what became of the packs.

    Returns the exit status: 1 when more than `allowed` images were left out.
    """
    for packed in outcomes:
        resumed = f" ({packed.resumed} of them by an earlier run)" if packed.resumed else ""
        print(f"{packed.path}: {counted(packed.written, 'image')} packed, {packed.rejected} left out{resumed}")
        if packed.rejected:
            print(f"  see {packed.path.with_suffix('.rejected.tsv')}")
    rejected = sum(packed.rejected for packed in outcomes)
    if rejected <= allowed:
        return 0
    were = "was" if rejected == 1 else "were"
    print(f"{counted(rejected, 'image')} {were} left out, {allowed} allowed (--allow-rejects)", file=sys.stderr)
    return 1
