"""`python -m training.checkpoint`: list checkpoints, compare two by parameter, rename or strip parameters.

Exit statuses: 0 fine (diff: no difference); 1 a checkpoint of `show` is damaged, or `diff` found a difference;
2 wrong usage or a file that cannot be read.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from atomic_file import AtomicFiles
from command_line import HelpFormatter, Parser
from engines.base import TrainState
from errors import ProjectError, UsageError
from graph.params_file import BFLOAT16, bfloat16_to_float32, write_arrays_to
from training.checkpoint import (
    EXTENSIONS,
    Entry,
    PrefixLock,
    iter_checkpoints,
    load_params_file,
    load_stem,
    prefix_of,
)

DIFFERENT = 1
DAMAGED = 1
ROW = "{:<24} {:>5} {:>7} {:>9}  {:>11} {:>9} {:>9}  {}"
HEADINGS = ("checkpoint", "epoch", "batch", "update", "train top-1", "val top-1", "size", "state")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    defaults = HelpFormatter
    parser = Parser(prog="python -m training.checkpoint", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="list the checkpoints of a prefix", formatter_class=defaults)
    show.add_argument("prefix", help="what --model-prefix was, for example model/se-resnext-50")
    show.add_argument("--quick", action="store_true", help="compare sizes only, read no files")
    show.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    show.set_defaults(run=run_show)

    diff = commands.add_parser("diff", help="compare two checkpoints by parameter", formatter_class=defaults)
    for name in ("a", "b"):
        diff.add_argument(name, help="a checkpoint: any of its files, or their path without extension")
    diff.add_argument("--params-only", action="store_true", help="leave optimizer states and update counts out")
    diff.set_defaults(run=run_diff)

    convert = commands.add_parser(
        "convert", help="write a checkpoint's parameters with names changed or left out", formatter_class=defaults
    )
    convert.add_argument("source", help="a checkpoint: any of its files, or its path without extension")
    convert.add_argument("target", help="path of the new one, without extension: for example finetune-0001")
    names = convert.add_argument_group("names (without the arg: and aux: before them)")
    names.add_argument(
        "--strip", action="append", default=[], metavar="GLOB", help="leave these out, for example 'fc1_*'; repeatable"
    )
    names.add_argument(
        "--rename", action="append", default=[], metavar="REGEX=NEW",
        help="replace every match of REGEX in a name by NEW (\\1 is its first group); repeatable, in order",
    )  # fmt: skip
    convert.add_argument("--states", action="store_true", help="convert the optimizer states too")
    convert.add_argument("--force", action="store_true", help="overwrite files that are there")
    convert.set_defaults(run=run_convert)
    return parser


# ---------------------------------------------------------------------------- show


def run_show(args: argparse.Namespace) -> int:
    """Print a line for each checkpoint as it is checked; 1 when one is damaged."""
    count = damaged = 0
    for entry in iter_checkpoints(args.prefix, hashes=not args.quick):
        if entry.problem and entry.lacks_manifest:
            # Somebody else's checkpoint: it cannot be compared with anything, but it can be read.
            entry.problem, broken = _foreign_state(entry)
        else:
            broken = entry.problem is not None
        if count == 0 and not args.json:
            print(ROW.format(*HEADINGS), flush=True)
        print(_as_json(entry) if args.json else _as_row(entry), flush=True)
        count += 1
        damaged += broken
    if not count:
        raise UsageError(f"no checkpoints under {args.prefix}: {_other_prefix(args.prefix)}")
    return DAMAGED if damaged else 0


def _other_prefix(prefix: str) -> str:
    """What to do about a prefix without checkpoints, perhaps because it names one of them."""
    stem = _stem(prefix)
    if any(Path(f"{stem}.{extension}").exists() for extension in EXTENSIONS):
        return f"that is a checkpoint itself; its prefix is {prefix_of(stem)}"
    return f"expected files such as {prefix}-0001.params"


def _foreign_state(entry: Entry) -> tuple[str, bool]:
    try:
        load_params_file(entry.stem.with_name(entry.stem.name + ".params"))
    except UsageError as error:
        return str(error), True
    return entry.problem, False


def _as_row(entry: Entry) -> str:
    manifest = entry.manifest or {}
    return ROW.format(
        entry.stem.name,
        entry.epoch if entry.epoch >= 0 else "?",
        entry.batch or "",
        manifest.get("updates", "?"),
        _metric(manifest, "train"),
        _metric(manifest, "validation"),
        f"{entry.size / 1e6:.1f} MB",
        entry.problem or "whole",
    ).rstrip()


def _metric(manifest: Mapping, part: str) -> str:
    """top-1 of a part ("train", "validation") in percent; empty where a manifest does not tell."""
    metrics = manifest.get("metrics")
    rates = metrics.get(part) if isinstance(metrics, dict) else None
    value = rates.get("top1") if isinstance(rates, dict) else None
    return f"{value:.2%}" if isinstance(value, (int, float)) else ""


def _as_json(entry: Entry) -> str:
    manifest = entry.manifest or {}
    record = {
        "checkpoint": str(entry.stem),
        "epoch": entry.epoch if entry.epoch >= 0 else None,
        "batch": entry.batch if entry.batch >= 0 else None,
        "updates": manifest.get("updates"),
        "saved": manifest.get("saved"),
        "metrics": manifest.get("metrics"),
        "bytes": entry.size,
        "valid": entry.problem is None,
        "problem": entry.problem,
    }
    return json.dumps(record)


# ---------------------------------------------------------------------------- diff


def run_diff(args: argparse.Namespace) -> int:
    """Print every difference, one a line, and a summary; 1 when there is one."""
    a, b = (_load(path) for path in (args.a, args.b))
    pairs = [(a.params, b.params)]
    if not args.params_only:
        pairs.append((a.optimizer, b.optimizer))
    lines, same = [], 0
    for ours, theirs in pairs:
        found = list(_array_differences(ours, theirs))
        lines += found
        same += len({*ours, *theirs}) - len(found)
    if not args.params_only and a.updates != b.updates:
        lines.append(f"updates: {a.updates} in A, {b.updates} in B")
    for line in lines:
        print(line)
    print(f"{len(lines)} differences, {same} arrays are the same" if lines else f"the same ({same} arrays)")
    return DIFFERENT if lines else 0


def _array_differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Iterable[str]:
    """One line for each array that is not the same bit by bit."""
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b or name not in a:
            side, array = ("A", a[name]) if name in a else ("B", b[name])
            yield f"{name}: only in {side}, {_describe(array)}"
        elif a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            yield f"{name}: {_describe(a[name])} in A, {_describe(b[name])} in B"
        elif a[name].tobytes() != b[name].tobytes():
            yield f"{name}: {_describe(a[name])}, {_distance(a[name], b[name])}"


def _describe(array: np.ndarray) -> str:
    return f"{'bfloat16' if array.dtype == BFLOAT16 else array.dtype} {array.shape}"


def _distance(a: np.ndarray, b: np.ndarray) -> str:
    """How far apart two arrays of the same shape are: count, largest and relative (Euclidean) difference."""
    x, y = (bfloat16_to_float32(v) if v.dtype == BFLOAT16 else v for v in (a, b))
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        largest = np.abs(x - y).max()
        relative = np.linalg.norm(x - y) / np.linalg.norm(x)
    # Zeros of either sign are equal as numbers, NaNs are not: only bits tell how many differ.
    width = a.dtype.itemsize
    bits = (np.ascontiguousarray(v).view(np.uint8).reshape(-1, width) for v in (a, b))
    count = int(np.not_equal(*bits).any(axis=1).sum())
    return f"{count} of {a.size} values differ, by {largest:.3g} at most, relative {relative:.3g}"


# ---------------------------------------------------------------------------- convert


def run_convert(args: argparse.Namespace) -> int:
    """Write `<target>.params` (and `.states`), say what was left out and renamed."""
    target = _stem(args.target)
    state = _load(args.source)
    rules = [_parse_rename(text) for text in args.rename]
    used: set[str] = set()
    params = _convert_names(state.params, args.strip, rules, used)
    optimizer = _convert_names(state.optimizer, args.strip, rules, used) if args.states else {}
    unused = [text for text in [*args.strip, *args.rename] if text not in used]
    if unused:
        raise UsageError(f"no parameter of {args.source} matches {', '.join(unused)}")
    if args.states and not optimizer:
        raise UsageError(f"{args.source} holds no optimizer states to convert; leave out --states")
    prefix = target.with_name(target.name.rpartition("-")[0] or target.name)
    with PrefixLock(prefix):
        _refuse_overwriting(target, args)
        try:
            with AtomicFiles() as files:
                write_arrays_to(files.open(f"{target}.params"), params)
                if args.states:
                    write_arrays_to(files.open(f"{target}.states"), optimizer)
        except OSError as error:
            raise ProjectError(f"cannot write {target}.params: {error.strerror or error}") from error
    left_out = len(state.params) - len(params)
    renamed = sum(name not in state.params for name in params)
    print(f"{target}.params: {len(params)} parameters, {renamed} renamed, {left_out} left out")
    return 0


def _refuse_overwriting(target: Path, args: argparse.Namespace) -> None:
    if Path(f"{target}.json").exists():
        raise UsageError(f"{target} is a checkpoint of a run; choose another target")
    there = [f"{target}.{extension}" for extension in EXTENSIONS if Path(f"{target}.{extension}").exists()]
    if there and not args.force:
        raise UsageError(f"{' and '.join(there)} exist; choose another target or give --force")


def _parse_rename(text: str) -> tuple[str, re.Pattern, str]:
    pattern, equals, replacement = text.partition("=")
    if not equals or not pattern:
        raise UsageError(f"--rename {text}: expected REGEX=NEW")
    try:
        return text, re.compile(pattern), replacement
    except re.error as error:
        raise UsageError(f"--rename {text}: {error}") from error


def _convert_names(
    arrays: Mapping[str, np.ndarray],
    strip: Iterable[str],
    rules: Iterable[tuple[str, re.Pattern, str]],
    used: set[str],
) -> dict[str, np.ndarray]:
    """Arrays under their new names; adds to `used` the options that had an effect."""
    converted: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        kind, colon, name = key.rpartition(":")
        matches = [glob for glob in strip if fnmatch.fnmatchcase(name, glob)]
        used.update(matches)
        if matches:
            continue
        for text, pattern, replacement in rules:
            if pattern.search(name):
                used.add(text)
                name = _replace(text, pattern, replacement, name)
        new = f"{kind}{colon}{name}"
        if new in converted:
            raise UsageError(f"two parameters would both be called {new}; make --rename tell them apart")
        converted[new] = array
    return converted


def _replace(text: str, pattern: re.Pattern, replacement: str, name: str) -> str:
    try:
        return pattern.sub(replacement, name)
    except (re.error, IndexError) as error:
        raise UsageError(f"--rename {text}: {error}") from error


# ---------------------------------------------------------------------------- shared


def _stem(text: str) -> Path:
    """A checkpoint's path without extension, from that or from one of its files."""
    path = Path(text)
    return path.with_suffix("") if path.suffix[1:] in EXTENSIONS else path


def _load(text: str) -> TrainState:
    stem = _stem(text)
    if not any(Path(f"{stem}.{extension}").exists() for extension in EXTENSIONS):
        raise UsageError(f"no checkpoint {stem}: there is no {stem.name}.params")
    return load_stem(stem).state
