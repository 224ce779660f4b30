"""Checkpoints: written whole or not at all, checked before they are believed, complete enough to go on from.

    <prefix>-symbol.json            the graph, one for all checkpoints of a prefix
    <prefix>-0050.params            MXNet's own file: parameters after 50 epochs
    <prefix>-0050.states            optimizer state, an MXNet NDArray list ("momentum:conv0_weight")
    <prefix>-0050.json              the manifest, written last: position, metrics, arguments, hashes
    <prefix>-0050b0001200.*         the same within an epoch: after 50 epochs and 1200 batches
    <prefix>-best.*                 a copy of the checkpoint with the best metric

The files of a checkpoint are completed on disk under temporary names before the first is renamed, so a
process killed at any moment leaves the old files, or the new ones, or (between two renames) enough to finish
the renaming: the next holder of the prefix's lock does that. Nothing here needs MXNet.

    python -m training.checkpoint --help        list, compare and convert checkpoints
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import atomic_file
from atomic_file import AtomicFiles
from engines.base import TrainState
from errors import ProjectError, UsageError, run_command
from graph.params_file import ParamsFileError, is_array_list, read_arrays, write_arrays_to
from graph.states_file import StatesFileError, read_module_states
from training.process_lock import ProcessLock

FORMAT = 1
# The files of a checkpoint besides the symbol, in the order in which they are renamed: the manifest is last.
EXTENSIONS = ("params", "states", "json")
BEST = "best"
# Checkpoints in the middle of an epoch only bridge the time to its end; one more guards against a damaged
# newest.
KEPT_WITHIN_EPOCH = 2
# A checkpoint of another network differs in hundreds of names; the first ones tell which one it is.
SHOWN_DIFFERENCES = 6
# Keys of the manifest that the functions here write; the caller's keys are all others.
OWN_KEYS = ("format", "epoch", "batch", "updates", "loss_scale", "sequence", "saved", "files")

log = logging.getLogger(__name__)


class CheckpointError(ProjectError):
    """A checkpoint could not be written; those on disk are as they were, and the run can go on without it."""


class DamagedCheckpointError(UsageError):
    """A checkpoint whose files are missing, incomplete or changed; the message says which and how."""


@dataclass
class Checkpoint:
    """A checkpoint that was read and found whole.

    epoch: epochs completed; batch: batches done in the epoch after them; path: the manifest, or the
    `.params` file where there is no manifest. Without a manifest `state` holds what could be found: optimizer
    states only if such a file is there (else the momentum starts afresh), updates 0 unless that file tells.
    """

    epoch: int
    batch: int
    state: TrainState
    manifest: dict | None
    symbol_json: str | None
    path: Path


@dataclass
class Entry:
    """A checkpoint on disk as `list_checkpoints` finds it; `problem` says why it cannot be used, None if
    whole.

    stem: path without extension. epoch, batch: as its name says (for the best one: as its manifest says; -1
    when that cannot be read). manifest: None when there is none or it cannot be read. size: bytes of its own
    files.
    """

    stem: Path
    epoch: int
    batch: int
    manifest: dict | None
    size: int
    problem: str | None

    @property
    def lacks_manifest(self) -> bool:
        """Whether another program wrote it (or a kill or somebody took its manifest away)."""
        return not Path(f"{self.stem}.json").exists()

    @property
    def is_best(self) -> bool:
        return self.stem.name.endswith(f"-{BEST}")

    @property
    def order(self) -> tuple[int, int, int, bool]:
        """Sorts by the order of saving (not by update count: a run may have gone back and on from there)."""
        sequence = self.manifest["sequence"] if self.manifest else -1
        return (sequence, self.epoch, self.batch, not self.is_best)


class PrefixLock(ProcessLock):
    """Context manager that every process holds while it writes checkpoints of `prefix` (file
    `<prefix>.lock`).

    Raises UsageError when another run holds it. On entry it finishes or removes what a killed run left half
    done.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        if os.fspath(prefix).endswith(os.sep):
            raise UsageError(f"{prefix} is a folder: the prefix needs the beginning of the files' names too")
        super().__init__(f"{os.fspath(prefix)}.lock")
        self.prefix = prefix

    def __enter__(self) -> PrefixLock:
        super().__enter__()
        try:
            recover(self.prefix)
        except BaseException:
            self.__exit__()
            raise
        return self


# ---------------------------------------------------------------------------- names


def checkpoint_stem(prefix: str | os.PathLike[str], epoch: int, batch: int = 0) -> Path:
    """Path without extension of the checkpoint after `epoch` epochs and `batch` batches of the next one."""
    within = f"b{batch:07d}" if batch else ""
    return Path(f"{os.fspath(prefix)}-{epoch:04d}{within}")


def symbol_path(prefix: str | os.PathLike[str]) -> Path:
    """The graph's file, which all checkpoints of a prefix share."""
    return Path(f"{os.fspath(prefix)}-symbol.json")


def _name_pattern(prefix: str | os.PathLike[str]) -> str:
    """Regular expression of a stem's name: exact, because `net-big-0001` is no checkpoint of `net`."""
    return rf"{re.escape(Path(prefix).name)}-(?:(?P<epoch>\d{{4,}})(?:b(?P<batch>\d{{7,}}))?|{BEST})"


def prefix_of(stem: Path) -> Path:
    """The prefix of a checkpoint's stem."""
    name, dash, _suffix = stem.name.rpartition("-")
    return stem.with_name(name) if dash else stem


# ---------------------------------------------------------------------------- saving


def save_checkpoint(
    prefix: str | os.PathLike[str],
    epoch: int,
    state: TrainState,
    *,
    symbol_json: str,
    manifest: Mapping[str, object],
    batch: int = 0,
) -> Path:
    """Write a checkpoint and return the path of its manifest; call it while holding the `PrefixLock`.

    epoch: epochs completed. batch: batches done in the next one (0 at an epoch's end). manifest: anything
    JSON can hold (numpy numbers too), except the keys in `OWN_KEYS`, which are added here. A directory that
    has vanished is made again, with a warning. Raises CheckpointError when the disk is full, read-only or
    otherwise fails; nothing of the new checkpoint is left then.
    """
    taken = sorted(set(OWN_KEYS) & set(manifest))
    if taken:
        raise ValueError(f"the manifest's keys {taken} are written by save_checkpoint")
    stem = checkpoint_stem(prefix, epoch, batch)
    try:
        _make_directory(stem.parent)
        _write_symbol(prefix, symbol_json)
        position = {"format": FORMAT, "epoch": epoch, "batch": batch, "updates": state.updates}
        position["loss_scale"] = state.loss_scale
        position["sequence"] = 1 + max((entry.order[0] for entry in _entries(prefix)), default=0)
        with AtomicFiles() as files:
            params = files.open(f"{stem}.params")
            write_arrays_to(params, state.params)
            states = files.open(f"{stem}.states")
            write_arrays_to(states, state.optimizer)
            record = {
                **position,
                "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **manifest,
                "files": {
                    "params": {"bytes": params.size, "sha256": params.sha256()},
                    "states": {"bytes": states.size, "sha256": states.sha256()},
                    "symbol": _describe_bytes(symbol_json.encode()),
                },
            }
            files.open(f"{stem}.json").write(_to_json(record))
    except OSError as error:
        raise CheckpointError(_save_failure(stem, error)) from error
    return Path(f"{stem}.json")


def save_best(manifest_path: str | os.PathLike[str]) -> Path:
    """Copy the checkpoint of a manifest to `<prefix>-best`; returns the copy's manifest.

    A copy, not a link: damage to one leaves the other whole. Raises CheckpointError as `save_checkpoint`.
    """
    source = Path(manifest_path).with_suffix("")
    best = prefix_of(source).with_name(f"{prefix_of(source).name}-{BEST}")
    try:
        with AtomicFiles() as files:
            for extension in EXTENSIONS:
                with open(f"{source}.{extension}", "rb") as original:
                    shutil.copyfileobj(original, files.open(f"{best}.{extension}"), 1 << 20)
    except OSError as error:
        raise CheckpointError(_save_failure(best, error)) from error
    return Path(f"{best}.json")


def prune(
    prefix: str | os.PathLike[str], keep: int | None, protect: Iterable[str | os.PathLike[str]] = ()
) -> list[Path]:
    """Delete old checkpoints; returns the stems of those deleted. Call it while holding the `PrefixLock`.

    Kept are the `keep` most recently saved ones (None: all), the best, and those in `protect` (paths of their
    manifests, stems or any of their files). Of the checkpoints within an epoch never more than the last
    `KEPT_WITHIN_EPOCH` are kept. Files without a manifest of ours are not touched: somebody else made them.
    Raises CheckpointError when files cannot be deleted.
    """
    spared = {_stem_of_file(path).name for path in protect}
    entries = [e for e in _entries(prefix) if e.manifest and not e.is_best]
    entries.sort(key=lambda entry: entry.order, reverse=True)
    within = [entry for entry in entries if entry.batch]
    surplus = within[KEPT_WITHIN_EPOCH:]
    whole = [entry for entry in entries if entry not in surplus and verify(entry.stem, hashes=False) is None]
    if keep is not None and len(whole) >= keep:
        last = whole[keep - 1].order if keep else (sys.maxsize, 0, 0, False)
        surplus += [entry for entry in entries if entry not in surplus and entry.order < last]
    doomed = [entry.stem for entry in surplus if entry.stem.name not in spared]
    try:
        for stem in doomed:
            # The manifest goes last: what a kill leaves is still known as ours, and deleted the next time.
            for extension in EXTENSIONS:
                Path(f"{stem}.{extension}").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot delete {error.filename}: {error.strerror or error}") from error
    return doomed


def recover(prefix: str | os.PathLike[str]) -> None:
    """Finish the renames that a killed run did not get to, and remove unfinished files of this prefix.

    Only the holder of the prefix's lock may call it: another run's files in the making look the same.
    """
    stem = _name_pattern(prefix)
    symbol = re.escape(symbol_path(prefix).name)
    pattern = re.compile(rf"\.(?P<name>(?P<stem>{stem})\.(?:{'|'.join(EXTENSIONS)})|{symbol})\.\d+\.tmp")
    directory = Path(prefix).parent
    found = [match for name in _names_in(directory) for match in [pattern.fullmatch(name)] if match]
    leftovers = {match["name"]: directory / match.group() for match in found}
    for match in found:
        if match["stem"] and match["name"].endswith(".json"):
            _finish_renames(directory / match["stem"], leftovers)
    for path in leftovers.values():
        path.unlink(missing_ok=True)


def _finish_renames(stem: Path, leftovers: Mapping[str, Path]) -> None:
    """Put a checkpoint's completed files in place if all of them are there, under either name, and whole."""
    try:
        manifest = _read_manifest(leftovers[f"{stem.name}.json"])
    except DamagedCheckpointError:
        return  # the kill came before the manifest was complete: nothing was renamed
    moves = []
    for extension in ("params", "states"):
        place = Path(f"{stem}.{extension}")
        candidates = [place, leftovers.get(place.name, place)]
        whole = [path for path in candidates if _file_problem(path, manifest["files"][extension]) is None]
        if not whole:
            return
        moves.append((whole[0], place))
    moves.append((leftovers[f"{stem.name}.json"], Path(f"{stem}.json")))
    for source, place in moves:
        if source != place:
            os.replace(source, place)
    atomic_file.sync_directory(stem.parent)


def _write_symbol(prefix: str | os.PathLike[str], symbol_json: str) -> None:
    """Write the graph's file if it is another one: a changed option (dropout, say) may change it within a run."""
    path = symbol_path(prefix)
    if _file_problem(path, _describe_bytes(symbol_json.encode())) is not None:
        atomic_file.write_text(path, symbol_json)


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        log.warning("the directory %s has vanished and is made again; checkpoints that were in it are gone", directory)


def _save_failure(stem: Path, error: OSError) -> str:
    return f"checkpoint {stem} was not saved: {error.strerror or error}; make room or make the directory writable"


def _to_json(record: Mapping[str, object]) -> bytes:
    # numpy's numbers are not JSON's; .item() makes them Python's own, without loss.
    return (json.dumps(record, indent=1, default=lambda value: value.item()) + "\n").encode()


# ---------------------------------------------------------------------------- reading


def load_checkpoint(prefix: str | os.PathLike[str], epoch: int, batch: int = 0) -> Checkpoint:
    """The checkpoint after `epoch` epochs (and `batch` batches), checked against its manifest if it has one.

    Without a manifest (checkpoints that other programs wrote) the `.params` file is enough; optimizer states are
    read where a Module pickled them beside it. Raises DamagedCheckpointError (a UsageError) naming the file and
    the cause.
    """
    return load_stem(_existing_stem(prefix, epoch, batch))


def _existing_stem(prefix: str | os.PathLike[str], epoch: int, batch: int = 0) -> Path:
    """The stem of a checkpoint of which something is there; DamagedCheckpointError tells which epochs are.

    Where only the newest are kept, an older epoch may still be there as the best one.
    """
    stem = checkpoint_stem(prefix, epoch, batch)
    if not any(Path(f"{stem}.{extension}").exists() for extension in ("params", "json")):
        ends = {entry.epoch: entry for entry in _entries(prefix) if not entry.batch}
        if not batch and epoch in ends:
            return ends[epoch].stem
        found = sorted(ends)
        there = f"there are epochs {', '.join(map(str, found))}" if found else f"there is none under {prefix}"
        raise DamagedCheckpointError(f"no checkpoint {stem}.params: {there}")
    return stem


def load_best(prefix: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint `<prefix>-best`; as `load_checkpoint`."""
    return load_stem(Path(f"{os.fspath(prefix)}-{BEST}"))


def load_params(prefix: str | os.PathLike[str], epoch: int) -> dict[str, np.ndarray]:
    """The parameters alone, "arg:NAME" and "aux:NAME" -> array, whatever the manifest says or lacks."""
    return load_params_file(Path(f"{_existing_stem(prefix, epoch)}.params"))


def load_params_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.params` file by name; raises ParamsFileError, which is a UsageError."""
    arrays = read_arrays(path)
    if not isinstance(arrays, dict):
        raise ParamsFileError(f"{path}: the arrays have no names")
    return arrays


def load_stem(stem: str | os.PathLike[str]) -> Checkpoint:
    """As `load_checkpoint`, by path without extension."""
    stem = Path(stem)
    manifest_path, params_path = Path(f"{stem}.json"), Path(f"{stem}.params")
    if not manifest_path.exists():
        return _load_without_manifest(stem)
    manifest = _read_manifest(manifest_path)
    problem = _files_problem(stem, manifest, hashes=True)
    if problem:
        raise DamagedCheckpointError(problem)
    try:
        params, optimizer = load_params_file(params_path), load_params_file(Path(f"{stem}.states"))
    except ParamsFileError as error:
        raise DamagedCheckpointError(str(error)) from error
    state = TrainState(params, optimizer, manifest["updates"], _loss_scale(manifest))
    symbol_json = symbol_path(prefix_of(stem)).read_text(encoding="utf-8")
    return Checkpoint(manifest["epoch"], manifest["batch"], state, manifest, symbol_json, manifest_path)


def _loss_scale(manifest: Mapping[str, object]) -> tuple[float, int] | None:
    """What a manifest says of it; checkpoints of other precisions, and older ones, say nothing."""
    found = manifest.get("loss_scale")
    if isinstance(found, list) and [type(value) for value in found] == [float, int] and 0 < found[0] < math.inf:
        return found[0], found[1]
    return None


def find_latest(prefix: str | os.PathLike[str]) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The most recently saved checkpoint that is whole, and those newer ones passed over with the reason.

    Most recent by the order of saving, which is that of update counts unless a run was restarted from an
    earlier checkpoint. Returns (None, passed over) when none is usable.
    """
    passed_over: list[tuple[Path, str]] = []
    entries = sorted(_entries(prefix), key=lambda entry: entry.order, reverse=True)
    for entry in (e for e in entries if e.manifest):
        try:
            found = load_stem(entry.stem)
        except DamagedCheckpointError as error:
            passed_over.append((entry.stem, str(error)))
            continue
        return found, passed_over + _unreadable(entries, (found.epoch, found.batch))
    return None, passed_over + _unreadable(entries, (-1, -1))


def iter_checkpoints(prefix: str | os.PathLike[str], *, hashes: bool = True) -> Iterator[Entry]:
    """Every checkpoint of a prefix in the order of saving, each checked as it comes (`hashes=False`: sizes only)."""
    for entry in sorted(_entries(prefix), key=lambda entry: entry.order):
        entry.problem = verify(entry.stem, hashes=hashes)
        yield entry


def verify(stem: str | os.PathLike[str], *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint (file and cause), None if it is whole; without a manifest it is not."""
    manifest_path = Path(f"{os.fspath(stem)}.json")
    if not manifest_path.exists():
        return "no manifest: only its .params can be loaded"
    try:
        manifest = _read_manifest(manifest_path)
    except DamagedCheckpointError as error:
        return str(error)
    return _files_problem(Path(stem), manifest, hashes=hashes)


def param_differences(expected: Mapping[str, Sequence[int]], params: Mapping[str, np.ndarray]) -> list[str]:
    """Every way in which `params` does not fit `expected` (name -> shape): missing, unexpected, misshaped."""
    missing = [f"{name} is missing" for name in expected if name not in params]
    unexpected = [f"{name} is not in the network" for name in params if name not in expected]
    misshaped = [
        f"{name} is {params[name].shape} in the file and {tuple(shape)} in the network"
        for name, shape in expected.items()
        if name in params and params[name].shape != tuple(shape)
    ]
    return missing + unexpected + misshaped


def check_params(expected: Mapping[str, Sequence[int]], params: Mapping[str, np.ndarray], source: object) -> None:
    """Raise one UsageError that lists `param_differences`; `source` is what the message calls the file.

    expected: "arg:NAME" and "aux:NAME" -> shape. params: the same names -> array.
    """
    differences = param_differences(expected, params)
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        shown = "; ".join(differences[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise UsageError(f"{source} does not fit the network: {shown}; give the flags of the network it was saved from")


def _entries(prefix: str | os.PathLike[str]) -> list[Entry]:
    """The checkpoints of a prefix by their names, unchecked: whatever has a `.params` file or a manifest."""
    pattern = re.compile(rf"(?P<stem>{_name_pattern(prefix)})\.(?:params|json)")
    directory = Path(prefix).parent
    matches = (pattern.fullmatch(name) for name in _names_in(directory))
    stems = {match["stem"]: match for match in matches if match}
    return [_entry(directory / name, match) for name, match in stems.items()]


def _entry(stem: Path, match: re.Match) -> Entry:
    try:
        manifest = _read_manifest(Path(f"{stem}.json"))
    except DamagedCheckpointError:
        manifest = None
    if match["epoch"]:
        epoch, batch = int(match["epoch"]), int(match["batch"] or 0)
    else:
        epoch, batch = (manifest["epoch"], manifest["batch"]) if manifest else (-1, -1)
    files = (Path(f"{stem}.{extension}") for extension in EXTENSIONS)
    size = sum(path.stat().st_size for path in files if path.is_file())
    return Entry(stem, epoch, batch, manifest, size, None)


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unreadable(entries: Iterable[Entry], after: tuple[int, int]) -> list[tuple[Path, str]]:
    """Checkpoints whose manifest is missing or damaged and that are, by their names, later than `after`."""
    return [
        (entry.stem, verify(entry.stem) or "changed while it was read")
        for entry in entries
        if entry.manifest is None and (entry.epoch, entry.batch) > after
    ]


def _stem_of_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix[1:] in EXTENSIONS else path


def _load_without_manifest(stem: Path) -> Checkpoint:
    path = Path(f"{stem}.params")
    try:
        state = TrainState(load_params_file(path))
        _add_states_without_manifest(state, Path(f"{stem}.states"))
    except ParamsFileError as error:
        raise DamagedCheckpointError(str(error)) from error
    except StatesFileError as error:
        raise DamagedCheckpointError(f"{error}; without that file the run starts with fresh momentum") from error
    prefix, epoch = prefix_of(stem), stem.name.rpartition("-")[2]
    symbol = symbol_path(prefix)
    symbol_json = symbol.read_text(encoding="utf-8") if symbol.is_file() else None
    return Checkpoint(int(epoch) if epoch.isdecimal() else 0, 0, state, None, symbol_json, path)


def _add_states_without_manifest(state: TrainState, path: Path) -> None:
    """Add the optimizer states of a file that is ours or a Module's pickle; none when there is no such file."""
    if not path.exists():
        return
    if is_array_list(path):
        state.optimizer = load_params_file(path)
        return
    names = [name[len("arg:") :] for name in state.params if name.startswith("arg:")]
    states = read_module_states(path, names)
    state.optimizer, state.updates = states.optimizer, states.updates or 0


def _read_manifest(path: Path) -> dict:
    """A manifest of ours, its own keys checked for type; raises DamagedCheckpointError."""
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: not JSON, truncated or damaged") from error
    numbers = ("epoch", "batch", "updates", "sequence")
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DamagedCheckpointError(f"{path}: not a checkpoint's manifest")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpointError(f"{path}: manifest format {manifest['format']!r}; this program reads {FORMAT}")
    if not all(type(manifest.get(key)) is int and manifest[key] >= 0 for key in numbers):
        raise DamagedCheckpointError(f"{path}: {', '.join(numbers)} must be whole numbers")
    files = manifest.get("files")
    for role in ("params", "states", "symbol"):
        described = files.get(role) if isinstance(files, dict) else None
        if not isinstance(described, dict) or set(described) != {"bytes", "sha256"}:
            raise DamagedCheckpointError(f"{path}: says nothing about the {role} file")
    return manifest


def _files_problem(stem: Path, manifest: dict, *, hashes: bool) -> str | None:
    for role in ("params", "states"):
        problem = _file_problem(Path(f"{stem}.{role}"), manifest["files"][role], hashes=hashes)
        if problem:
            return problem
    path = symbol_path(prefix_of(stem))
    problem = _file_problem(path, manifest["files"]["symbol"])
    # The prefix's checkpoints share this file, and a later one may have brought another graph: that is no damage.
    return problem if problem and not _is_graph(path) else None


def _is_graph(path: Path) -> bool:
    try:
        return "nodes" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _file_problem(path: Path, described: Mapping[str, object], *, hashes: bool = True) -> str | None:
    """Why a file is not the one described by size and hash; None if it is."""
    try:
        size = path.stat().st_size
        if size != described["bytes"]:
            return f"{path} has {size} bytes instead of {described['bytes']}"
        if hashes and _sha256(path) != described["sha256"]:
            return f"{path} has changed since it was saved (SHA-256 differs)"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _describe_bytes(data: bytes) -> dict[str, object]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    from training.checkpoint_tools import main

    sys.exit(run_command(main))
