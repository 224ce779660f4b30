"""Curves of runs: what is drawn, and the one place that draws it.

A group is one line of a picture: a single run, or runs that differ only in their seed, drawn as their mean
with a band from the lowest to the highest. matplotlib is imported when a picture is made, with the Agg
backend, so no display is needed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atomic_file import write_bytes
from errors import ProjectError, UsageError
from training.progress import say
from training.run_log import Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; its yellow, too pale on white, is a brown here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C2E")
# From the ninth line on the colours begin anew, with the next marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TRAINING_DASHES = (0, (4, 2))
KINDS_OF_LINES = {
    "validation": {"linewidth": 1.8},
    "training": {"linewidth": 1.0, "linestyle": TRAINING_DASHES},
    "rate step (new rate)": {"linewidth": 1.1, "linestyle": ":"},
    "best epoch": {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none"},
}
PICTURE_SUFFIXES = (".png", ".svg")
PARTS = ("train", "validation")


@dataclass(frozen=True)
class Panel:
    """One diagram: `metric` of the log; errors are drawn as 100 * (1 - accuracy)."""

    metric: str
    title: str
    unit: str
    is_error: bool

    def shown(self, values: np.ndarray) -> np.ndarray:
        """Values of the log in the panel's unit."""
        return 100.0 * (1.0 - values) if self.is_error else values


PANELS = (
    Panel("top1", "Top-1 error", "top-1 error (%)", True),
    Panel("top5", "Top-5 error", "top-5 error (%)", True),
    Panel("loss", "Loss", "cross entropy (nats)", False),
)


@dataclass(frozen=True)
class XAxis:
    """What the curves are drawn over: `key` of the epoch lines, in one of the `units` (label, size)."""

    key: str
    title: str
    units: tuple[tuple[str, float], ...]

    def unit_for(self, largest: float) -> tuple[str, float]:
        """The largest unit of which at least two fit into the axis."""
        fitting = [unit for unit in self.units if largest >= 2 * unit[1]]
        return fitting[-1] if fitting else self.units[0]


X_AXES = {
    "epochs": XAxis("epoch", "by epochs", (("epoch", 1.0),)),
    "images": XAxis(
        "images",
        "by images seen",
        (("images seen", 1.0), ("images seen (thousands)", 1e3), ("images seen (millions)", 1e6)),
    ),
    "time": XAxis(
        "elapsed",
        "by wall-clock time",
        (("wall-clock time (s)", 1.0), ("wall-clock time (min)", 60.0), ("wall-clock time (h)", 3600.0)),
    ),
}


@dataclass
class Group:
    """Runs that make one line: `label` names it, `runs` hold at least one."""

    label: str
    runs: list[Run]

    def common_epochs(self) -> list[int]:
        """Epochs that every run of the group has finished; a mean that loses runs on its way would jump."""
        shared = set.intersection(*({row["epoch"] for row in run.epochs} for run in self.runs))
        return sorted(shared)

    def table(self, metric: str, part: str | None = None) -> np.ndarray:
        """A figure of the log, (runs, common epochs) float64; NaN where a log does not have it."""
        shared = self.common_epochs()
        rows = []
        for run in self.runs:
            by_epoch = dict(zip((row["epoch"] for row in run.epochs), run.values(metric, part)))
            rows.append([by_epoch[epoch] for epoch in shared])
        return np.array(rows, dtype=np.float64).reshape(len(self.runs), len(shared))


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read the logs that can be read, each once, and name them apart.

    Returns the runs and the complaints about the other files, which are printed as warnings as well.

    Raises:
        UsageError: none of the files could be read.
    """
    runs: dict[Path, Run] = {}
    complaints: list[str] = []
    for path in paths:
        try:
            run = read_run(path)
        except ProjectError as error:
            complaints.append(str(error))
            say(f"warning: left out: {error}")
        else:
            runs.setdefault(run.path.resolve(), run)
    if not runs:
        raise UsageError("nothing to draw: no training log among the files given; name run.jsonl files or MXNet logs")
    _name_apart(list(runs.values()))
    return list(runs.values()), complaints


def _name_apart(runs: list[Run]) -> None:
    """Put folders before equal names until they differ."""
    depth = 1
    while len({run.name for run in runs}) < len(runs):
        names = [run.name for run in runs]
        parts = [run.path.resolve().with_suffix("").parts for run in runs]
        if depth > max(map(len, parts)):
            return
        for run, own_parts in zip(runs, parts):
            if names.count(run.name) > 1:
                run.name = "/".join(own_parts[-depth:])
        depth += 1


def rate_steps(run: Run) -> list[tuple[int, float]]:
    """Steps of the learning rate: (epochs completed before it, rate after it).

    Three or more changes in a row are a ramp (a warm-up, a cosine) and no steps.
    """
    rates = run.values("lr")
    changes = [
        index
        for index in range(1, len(rates))
        if rates[index] != rates[index - 1] and not math.isnan(rates[index]) and not math.isnan(rates[index - 1])
    ]
    changed = set(changes)
    steps = []
    for index in changes:
        low, high = index, index
        while low - 1 in changed:
            low -= 1
        while high + 1 in changed:
            high += 1
        if high - low < 2:
            steps.append((run.epochs[index - 1]["epoch"], rates[index]))
    return steps


def draw_curves(groups: Sequence[Group], axis: str = "epochs", title: str | None = None) -> Figure:
    """Draw top-1 error, top-5 error and loss of all groups, training and validation, over one of X_AXES.

    A figure that no log has is left out, and so is a group whose logs do not tell its x values.

    Raises:
        ProjectError: nothing is left to draw over this axis.
    """
    x_axis = X_AXES[axis]
    missing = without_axis(groups, axis)
    drawn = [(place, group) for place, group in enumerate(groups) if group.label not in missing]
    panels = [panel for panel in PANELS if any(_has(group, panel) for _, group in drawn)]
    if not panels:
        raise ProjectError(f"nothing to draw {x_axis.title}: the logs do not hold the figures for it")
    largest = max(float(np.nanmax(group.table(x_axis.key))) for _, group in drawn)
    label, unit = x_axis.unit_for(largest)

    figure = _new_figure(len(panels), len(drawn))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels):
        for place, group in drawn:
            _draw_group(axes, panel, group, x_axis, unit, place)
        _draw_steps(axes, [group for _, group in drawn], [place for place, _ in drawn], x_axis, unit)
        _dress(axes, panel, label, [group for _, group in drawn], axis)
    _add_legends(figure, drawn, title or f"Training and validation {x_axis.title}")
    return figure


def without_axis(groups: Sequence[Group], axis: str) -> list[str]:
    """Labels of the groups whose logs do not tell where they stand on this axis."""
    key = X_AXES[axis].key
    return [group.label for group in groups if not np.isfinite(_mean(group.table(key))).any()]


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write a picture; its suffix (.png or .svg) chooses the format.

    Raises:
        UsageError: the suffix is another one, or the file cannot be written.
    """
    path = check_picture_path(path)
    write_output(path, picture_bytes(figure, path.suffix.lower()[1:]))


def write_output(path: Path, content: bytes) -> None:
    """Write a result file; a place that cannot be written is a UsageError."""
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def check_picture_path(path: str | Path) -> Path:
    """`path`, when its suffix names a format that can be drawn; to be asked before any work."""
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UsageError(f"{path}: a picture's name must end in {' or '.join(PICTURE_SUFFIXES)}")
    return path


def picture_bytes(figure: Figure, kind: str) -> bytes:
    """The picture as "png" or "svg"; equal figures give equal bytes."""
    import matplotlib

    buffer = io.BytesIO()
    # A fixed salt and no date: the same curves make the same file. Letters as paths look the same everywhere.
    with matplotlib.rc_context({"svg.hashsalt": "curves", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, metadata=metadata, facecolor="white")
    return buffer.getvalue()


def _new_figure(panels: int, lines: int) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = math.ceil(lines / _legend_columns(lines, panels))
    figure = Figure(figsize=(max(7.5, 0.8 + 4.6 * panels), 4.9 + 0.21 * rows), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
    return figure


def _legend_columns(lines: int, panels: int) -> int:
    return 1 if lines <= 3 or panels == 1 else 2


def _has(group: Group, panel: Panel) -> bool:
    return any(np.isfinite(group.table(panel.metric, part)).any() for part in PARTS)


def _style(place: int) -> tuple[str, str]:
    """Colour and marker of the line at this place among all groups."""
    return COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]


def _draw_group(axes: Axes, panel: Panel, group: Group, x_axis: XAxis, unit: float, place: int) -> None:
    colour, marker = _style(place)
    x = _mean(group.table(x_axis.key)) / unit
    short = len(x) <= 15
    for part in PARTS:
        values = panel.shown(group.table(panel.metric, part))
        if not np.isfinite(values).any():
            continue
        is_train = part == "train"
        axes.plot(
            x,
            _mean(values),
            color=colour,
            linestyle=TRAINING_DASHES if is_train else "-",
            linewidth=1.0 if is_train else 1.8,
            alpha=0.75 if is_train else 1.0,
            marker=marker if short or place >= len(COLOURS) else None,
            markersize=2.5 if is_train else 4,
            markevery=1 if short else max(1, len(x) // 12),
            zorder=2 if is_train else 3,
        )
        if len(group.runs) > 1:
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    _mark_best(axes, panel, group, x, colour)


def _mark_best(axes: Axes, panel: Panel, group: Group, x: np.ndarray, colour: str) -> None:
    """A ring at the best epoch: of the run, or of the mean over seeds."""
    if panel.metric != "top1":
        return
    found = best_of(group)
    if found is not None:
        epoch, part, accuracy = found
        at = group.common_epochs().index(epoch)
        axes.plot(
            x[at],
            panel.shown(np.array(accuracy)),
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=1.6,
            zorder=4,
        )


def best_of(group: Group) -> tuple[int, str, float] | None:
    """(epoch, part, accuracy) of the best mean top-1: on validation, or on training where there is none."""
    for part in reversed(PARTS):
        means = _mean(group.table("top1", part))
        if np.isfinite(means).any():
            at = int(np.nanargmax(means))
            return group.common_epochs()[at], part, float(means[at])
    return None


def _draw_steps(axes: Axes, groups: list[Group], places: list[int], x_axis: XAxis, unit: float) -> None:
    """Mark the rate steps, in a line's colour where it steps alone; rates are written where there is room."""
    steps: dict[float, list[tuple[int, float]]] = {}
    for place, group in zip(places, groups):
        x = dict(zip(group.common_epochs(), _mean(group.table(x_axis.key)) / unit))
        for epoch, rate in rate_steps(group.runs[0]):
            if epoch in x and np.isfinite(x[epoch]):
                steps.setdefault(float(x[epoch]), []).append((place, rate))
    low, high = axes.get_xlim()
    free_from = low
    for position, owners in sorted(steps.items()):
        colour = _style(owners[0][0])[0] if len(owners) == 1 < len(groups) else "#777777"
        axes.axvline(position, color=colour, linestyle=":", linewidth=1.1, alpha=0.8, zorder=1)
        rates = {f"{rate:.3g}" for _, rate in owners}
        if len(rates) == 1 and position >= free_from:
            free_from = position + 0.025 * (high - low)
            axes.annotate(
                rates.pop(),
                (position, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, -3),
                textcoords="offset points",
                rotation=90,
                va="top",
                ha="left",
                fontsize=6.5,
                color=colour,
            )


def _dress(axes: Axes, panel: Panel, x_label: str, groups: list[Group], axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(panel.unit)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axis == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        epochs = [epoch for group in groups for epoch in group.common_epochs()]
        margin = 0.4 + 0.02 * (max(epochs) - min(epochs))
        axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    bounds = _y_bounds(panel, groups)
    if bounds:
        axes.set_ylim(*bounds)


def _y_bounds(panel: Panel, groups: list[Group]) -> tuple[float, float] | None:
    """Limits that show all of short runs; first epochs and spikes of long ones may leave the picture."""
    tables = [panel.shown(group.table(panel.metric, part)) for group in groups for part in PARTS]
    values = np.concatenate([table.ravel() for table in tables])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if len(values) >= 60:
        high = min(high, 1.25 * float(np.quantile(values, 0.96)))
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.05
    # The written rates hang from the upper edge; curves stay below them.
    headroom = 3 * margin if any(rate_steps(group.runs[0]) for group in groups) else margin
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + headroom


def _add_legends(figure: Figure, drawn: list[tuple[int, Group]], title: str) -> None:
    """The lines' names below the diagrams, title and kinds of lines above them: nothing covers a curve."""
    from matplotlib.lines import Line2D

    handles = []
    for place, group in drawn:
        colour, marker = _style(place)
        handles.append(Line2D([], [], color=colour, linewidth=2.2, marker=marker, label=legend_label(group)))
    kinds = [Line2D([], [], color="#444444", label=name, **style) for name, style in KINDS_OF_LINES.items()]
    if any(len(group.runs) > 1 for _, group in drawn):
        kinds.append(Line2D([], [], color="#444444", linewidth=7, alpha=0.2, label="range over seeds"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=_legend_columns(len(drawn), len(figure.axes)),
        frameon=False,
        fontsize=9,
        markerscale=0.7,
    )
    figure.legend(
        handles=kinds,
        title=title,
        title_fontproperties={"size": 13, "weight": "bold"},
        loc="outside upper center",
        ncols=len(kinds),
        frameon=False,
        fontsize=8.5,
    )


def legend_label(group: Group) -> str:
    """Name of the line and its best epoch, such as `se: best epoch 45, top-1 error 6.30 %, top-5 0.20 %`."""
    found = best_of(group)
    name = group.label if len(group.label) <= 60 else f"{group.label[:28]}…{group.label[-28:]}"
    if found is None:
        return name
    epoch, part, accuracy = found
    text = f"{name}: best epoch {epoch}, top-1 error {100 * (1 - accuracy):.2f} %"
    top5 = _mean(group.table("top5", part))[group.common_epochs().index(epoch)]
    if math.isfinite(top5):
        text += f", top-5 {100 * (1 - top5):.2f} %"
    return text if part == "validation" else f"{text} (training)"


def _mean(table: np.ndarray) -> np.ndarray:
    """Mean over runs; NaN where one of them has no figure."""
    return table.mean(axis=0)
