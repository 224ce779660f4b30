"""Runs side by side: which belong together, their figures, and where their arguments differ."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.curves import Group
from training.run_log import Run, number

# Arguments that say where files lie or how a run is recorded; runs that differ in them did the same training.
PLACES = {"log_dir", "model_prefix", "data_dir", "train_rec", "val_rec"}
RECORDING = {"frequent", "keep", "overwrite", "resume", "save_every"}
NOT_COMPARED = {"seed"} | PLACES | RECORDING
NOT_LOGGED = "not logged"
# What the header knows beyond the arguments; it tells apart runs on other data under the same flags.
FACTS = ("network", "engine", "classes", "train_images", "val_images", "parameters", "multiply_adds")


@dataclass(frozen=True)
class Column:
    """A column of the table.

    read: takes the figure from a run, NaN when its log has none. text: prints it. bold_best: show the highest.
    """

    key: str
    title: str
    read: Callable[[Run], float]
    text: Callable[[float], str]
    bold_best: bool = False


def _percent(value: float) -> str:
    return f"{value:.2f}"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as text: `42.3 s`, `5 min 03 s` or `7 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _billions(value: float) -> str:
    return f"{value / 1e9:.3g} G" if value >= 1e9 else f"{value / 1e6:.3g} M"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def _best(metric: str) -> Callable[[Run], float]:
    return lambda run: 100 * _nan_or(np.nanmax, run.values(metric, "validation"))


def _final(metric: str) -> Callable[[Run], float]:
    # The last that was validated: a run may have been stopped between an epoch and its validation.
    return lambda run: 100 * _nan_or(lambda values: values[-1], run.values(metric, "validation"))


def _highest(name: str) -> Callable[[Run], float]:
    return lambda run: _nan_or(max, run.values(name))


def _header(name: str) -> Callable[[Run], float]:
    return lambda run: number(run.header.get(name))


def _nan_or(function: Callable[[list[float]], float], values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(function(finite)) if finite else math.nan


COLUMNS = (
    Column("best_top1_percent", "best top-1 (%)", _best("top1"), _percent, True),
    Column("final_top1_percent", "final top-1 (%)", _final("top1"), _percent, True),
    Column("best_top5_percent", "best top-5 (%)", _best("top5"), _percent, True),
    Column("final_top5_percent", "final top-5 (%)", _final("top5"), _percent, True),
    # The median: an epoch that shared the machine with something else does not move it.
    Column(
        "images_per_second",
        "images/s",
        lambda run: _nan_or(np.median, run.values("images_per_second")),
        _speed,
    ),
    Column("seconds", "time", lambda run: run.values("elapsed")[-1], duration),
    Column("peak_memory_bytes", "peak memory", _highest("peak_memory"), _megabytes),
    Column("parameters", "parameters", _header("parameters"), _count),
    Column("multiply_adds", "multiply-adds", _header("multiply_adds"), _billions),
)


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of a figure over the runs of a group."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None when a value is missing: a mean over some of the seeds would be another figure."""
        if not all(map(math.isfinite, values)):
            return None
        return cls(math.fsum(values) / len(values), min(values), max(values))

    def range_text(self, column: Column) -> str:
        """`90.90 to 91.50`; empty when the runs do not differ in what is printed."""
        low, high = column.text(self.low), column.text(self.high)
        return "" if low == high else f"{low} to {high}"

    def text(self, column: Column) -> str:
        """`91.20` or, over several differing runs, `91.20 (90.90 to 91.50)`."""
        ends = self.range_text(column)
        return column.text(self.mean) + (f" ({ends})" if ends else "")


@dataclass
class Row:
    """A group in the table; `spreads` has every key of COLUMNS, None where a log does not tell it."""

    group: Group
    spreads: dict[str, Spread | None]

    @property
    def epochs(self) -> str:
        """Epochs finished, a range when the group's runs ended at different ones."""
        last = sorted({run.epochs[-1]["epoch"] for run in self.group.runs})
        return str(last[0]) if len(last) == 1 else f"{last[0]} to {last[-1]}"


def arguments_of(run: Run) -> dict[str, object]:
    """The run's arguments under one spelling (`lr_steps`), without a prefix to load from that gave nothing."""
    given = _table_in_header(run, "arguments")
    arguments = {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}
    # It is the run's own prefix by default; only weights from elsewhere make another training.
    if not arguments.get("model_load_epoch") or arguments.get("model_load_prefix") == arguments.get("model_prefix"):
        arguments.pop("model_load_prefix", None)
    return arguments


def _table_in_header(run: Run, name: str) -> dict[str, object]:
    value = run.header.get(name)
    return value if isinstance(value, dict) else {}


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in nothing but their seed (and places and recording), in order.

    A run without a logged seed stays alone, and a seed that comes again opens another group: a repetition is
    no further seed.
    """
    members: dict[object, list[list[Run]]] = {}
    in_order: list[list[Run]] = []
    for run in runs:
        arguments = arguments_of(run)
        seed = arguments.get("seed")
        key = repr([sorted(_compared(arguments).items()), [run.header.get(fact) for fact in FACTS]])
        same = members.setdefault(key, [])
        room = [group for group in same if all(arguments_of(other)["seed"] != seed for other in group)]
        if seed is not None and room:
            room[0].append(run)
            continue
        opened = [run]
        in_order.append(opened)
        if seed is not None:
            same.append(opened)
    return _labelled(in_order)


def _compared(arguments: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if name not in NOT_COMPARED}


def _labelled(members: list[list[Run]]) -> list[Group]:
    """Groups named by what their runs' names have in common, and told apart where that is the same."""
    groups = []
    for runs in members:
        label = runs[0].name
        if len(runs) > 1:
            common = os.path.commonprefix([run.name for run in runs]).rstrip("0123456789-_./ ")
            common = common.removesuffix("seed").removesuffix("-s").rstrip("-_./ ")
            label = f"{common or runs[0].name} ({len(runs)} seeds)"
        taken = [group.label for group in groups]
        groups.append(Group(label if label not in taken else f"{label}, {runs[0].name}", runs))
    return groups


def compare(groups: Sequence[Group]) -> list[Row]:
    """The figures of every group. A run's best and final accuracy are of its validation."""
    return [
        Row(group, {column.key: Spread.of([column.read(run) for run in group.runs]) for column in COLUMNS})
        for group in groups
    ]


def column_titles() -> list[str]:
    """Titles of the table's columns."""
    return ["run", "epochs", *(column.title for column in COLUMNS)]


def cells(row: Row) -> list[str]:
    """A row of the table as text; `-` where a log does not tell the figure."""
    figures = [(column, row.spreads[column.key]) for column in COLUMNS]
    return [
        row.group.label,
        row.epochs,
        *(spread.text(column) if spread else "-" for column, spread in figures),
    ]


def best_cells(rows: Sequence[Row]) -> set[tuple[int, int]]:
    """(row, column) of the highest mean of accuracies where more than one row has the figure."""
    found = set()
    for place, column in enumerate(COLUMNS):
        means = {at: row.spreads[column.key].mean for at, row in enumerate(rows) if row.spreads[column.key]}
        if column.bold_best and len(means) > 1:
            best = max(means.values())
            found |= {(at, place + 2) for at, mean in means.items() if mean == best}
    return found


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown, the best of a column in bold."""
    best = best_cells(rows)
    lines = [column_titles(), ["---"] + ["---:"] * (len(COLUMNS) + 1)]
    for at, row in enumerate(rows):
        texts = [text.replace("|", "\\|") for text in cells(row)]
        lines.append([f"**{text}**" if (at, place) in best else text for place, text in enumerate(texts)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_table(rows: Sequence[Row]) -> str:
    """The table for programs: mean, lowest and highest as plain numbers, empty when unknown."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("mean", "low", "high")
    names = [f"{column.key}_{end}" for column in COLUMNS for end in ends]
    writer.writerow(["run", "runs", "seeds", "epochs_low", "epochs_high", *names, "logs"])
    for row in rows:
        runs = row.group.runs
        seeds = [arguments_of(run).get("seed") for run in runs]
        last = [run.epochs[-1]["epoch"] for run in runs]
        numbers = [
            f"{getattr(spread, end):.10g}" if spread else ""
            for spread in row.spreads.values()
            for end in ("mean", "low", "high")
        ]
        writer.writerow(
            [
                row.group.label,
                len(runs),
                " ".join(str(seed) for seed in seeds if seed is not None),
                min(last),
                max(last),
                *numbers,
                " ".join(str(run.path) for run in runs),
            ]
        )
    return text.getvalue()


def reading(rows: Sequence[Row]) -> list[str]:
    """What the final top-1 allows to say, in sentences: the highest mean, and whose range it overlaps."""
    column = next(column for column in COLUMNS if column.key == "final_top1_percent")
    known = [(row, row.spreads[column.key]) for row in rows if row.spreads[column.key]]
    if len(known) < 2:
        return []
    known.sort(key=lambda pair: -pair[1].mean)
    first, lead = known[0]
    sentences = [f"Highest final top-1 on validation: {first.group.label}, {lead.text(column)} %."]
    for row, spread in known[1:]:
        gap = f"{row.group.label} is {lead.mean - spread.mean:.2f} points lower"
        if len(row.group.runs) == 1 or len(first.group.runs) == 1:
            sentences.append(f"{gap}; without several seeds of both, their spread is not known.")
        elif spread.high >= lead.low:
            sentences.append(f"{gap}; the ranges over seeds overlap, so the order may be chance.")
        else:
            sentences.append(f"{gap}; the ranges over seeds do not overlap.")
    ends = {run.epochs[-1]["epoch"] for row, _ in known for run in row.group.runs}
    if len(ends) > 1:
        sentences.append(f"The runs ended at different epochs ({min(ends)} to {max(ends)}).")
    return sentences


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str], bool]]:
    """Arguments, facts and versions: (name, text of every group, whether they differ), the differing first.

    Seeds and places are listed, but never count as a difference, nor does a log that does not tell the value.
    """
    tables = [[_told(run) for run in group.runs] for group in groups]
    names = dict.fromkeys(name for table in tables for told in table for name in told)
    rows = []
    for name in names:
        texts = [", ".join(dict.fromkeys(told.get(name, NOT_LOGGED) for told in table)) for table in tables]
        rows.append((name, texts, len(set(texts) - {NOT_LOGGED}) > 1 and name not in NOT_COMPARED))
    return sorted(rows, key=lambda row: not row[2])


def _told(run: Run) -> dict[str, str]:
    arguments = arguments_of(run)
    facts = {name: run.header[name] for name in FACTS if name in run.header and name not in arguments}
    versions = {f"version of {name}": value for name, value in _table_in_header(run, "versions").items()}
    return {name: _value_text(value) for name, value in {**facts, **arguments, **versions}.items()}


def _value_text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
