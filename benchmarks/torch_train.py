"""The declared SE-ResNeXt-50 on PyTorch against a hand-written module, MXNet and, on a GPU, timm.

    python -m benchmarks.torch_train                                  # all sections, about 15 minutes on two cores
    python -m benchmarks.torch_train --only train --rounds 3          # one section; the others' results stay

Frameworks run in processes of their own that take turns, one step of each contender a round; a ratio is the median over
the rounds of the ratio within a round, so that whatever else the machine does weighs on both alike. The results are
written as a table, with the machine, to benchmarks/results/torch_train.md (figures: torch_train.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks._contenders import Task, has_timm

# Seconds after which the threads of the last contender have stopped to wait for work actively.
PAUSE = 0.3
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "mxnet", "timm")
# What decides how fast CPUs multiply, as /proc/cpuinfo calls it.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Row:
    """A contender, called `title` in the table. kind: of its process: "mxnet", "default" (PyTorch, the allocator as it
    is) or "kept" (PyTorch, freed memory kept)."""

    title: str
    kind: str
    task: Task


@dataclass(frozen=True)
class Section:
    """Contenders that take turns. ratios: (title, title of the base, wanted or None)."""

    title: str
    rows: tuple[Row, ...]
    ratios: tuple[tuple[str, str, float | None], ...]
    rounds: int


def train_section(rows: int = 16) -> Section:
    contenders = [
        Row("MXNet (symbol engine), float32", "mxnet", Task("engine", "train", "float32", rows)),
        Row("MXNet, operators as declared, float32", "mxnet", Task("original", "train", "float32", rows)),
    ]
    ratios = []
    for dtype, wanted in (("float32", 4.0), ("bfloat16", 7.0)):
        for who, title in (("graph", "graph"), ("hand", "hand-written"), ("engine", "torch engine")):
            contenders.append(Row(f"{title}, {dtype}", "kept", Task(who, "train", dtype, rows)))
        ratios += [
            (f"graph, {dtype}", f"hand-written, {dtype}", 0.98),
            (f"torch engine, {dtype}", "MXNet (symbol engine), float32", wanted),
            (f"torch engine, {dtype}", "MXNet, operators as declared, float32", wanted),
        ]
    contenders.append(Row("graph, float32, allocator as it is", "default", Task("graph", "train", "float32", rows)))
    ratios.append(("graph, float32", "graph, float32, allocator as it is", None))
    add_timm(contenders, ratios, "train", rows)
    return Section(f"Training, batch {rows}", tuple(contenders), tuple(ratios), rounds=4)


def add_timm(contenders: list[Row], ratios: list[tuple], mode: str, rows: int) -> None:
    """timm's seresnext50_32x4d beside the graph, where it is installed."""
    for dtype in ("float32", "bfloat16") if has_timm() else ():
        contenders.append(Row(f"timm, {dtype}", "kept", Task("timm", mode, dtype, rows)))
        ratios.append((f"graph, {dtype}", f"timm, {dtype}", None))


def inference_section(rows: int = 16) -> Section:
    contenders = [Row("MXNet (symbol engine), float32", "mxnet", Task("engine", "infer", "float32", rows))]
    ratios = []
    for dtype in ("float32", "bfloat16"):
        for who, title in (("graph", "graph"), ("hand", "hand-written")):
            contenders.append(Row(f"{title}, {dtype}", "kept", Task(who, "infer", dtype, rows)))
        ratios.append((f"graph, {dtype}", f"hand-written, {dtype}", 0.98))
        ratios.append((f"graph, {dtype}", "MXNet (symbol engine), float32", None))
    contenders.append(Row("graph, float32, allocator as it is", "default", Task("graph", "infer", "float32", rows)))
    ratios.append(("graph, float32", "graph, float32, allocator as it is", None))
    add_timm(contenders, ratios, "infer", rows)
    return Section(f"Inference, batch {rows}", tuple(contenders), tuple(ratios), rounds=7)


def optimize_section(rows: int) -> Section:
    contenders = [Row("MXNet (symbol engine)", "mxnet", Task("engine", "infer", "float32", rows))]
    ratios = []
    for kind, note in (("default", ""), ("kept", ", freed memory kept")):
        for who, title in (("graph", "unfused"), ("folded", "folded"), ("packed", "optimize_for_inference")):
            contenders.append(Row(title + note, kind, Task(who, "infer", "float32", rows)))
        ratios.append((f"folded{note}", f"unfused{note}", None))
        ratios.append((f"optimize_for_inference{note}", f"unfused{note}", None if note else 1.3))
        ratios.append((f"optimize_for_inference{note}", "MXNet (symbol engine)", None))
    ratios.append(("optimize_for_inference, freed memory kept", "unfused", None))
    title = f"optimize_for_inference, float32, batch {rows}"
    return Section(title, tuple(contenders), tuple(ratios), rounds=15 if rows == 1 else 5)


SECTIONS = {
    "train": train_section,
    "inference": inference_section,
    "optimize-1": lambda: optimize_section(1),
    "optimize-32": lambda: optimize_section(32),
}


class Workers:
    """The processes of the contenders, started when they are first needed."""

    def __init__(self, params: Path, threads: int):
        self.params, self.threads = params, threads
        self.processes: dict[str, subprocess.Popen] = {}

    def measure(self, row: Row) -> float:
        """Seconds of one step."""
        time.sleep(PAUSE)
        process = self.processes.get(row.kind) or self._start(row.kind)
        process.stdin.write(json.dumps(row.task) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{row.title}: the process ended with status {process.wait()}")
        return float(json.loads(answer))

    def _start(self, kind: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "benchmarks._contenders", kind, str(self.params)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        self.processes[kind] = process
        return process

    def close(self) -> None:
        for process in self.processes.values():
            process.stdin.close()
            process.wait()


def measure(section: Section, rounds: int, params: Path, threads: int) -> dict:
    """Seconds of every contender, round by round, and what the ratios make of them."""
    seconds: dict[str, list[float]] = {row.title: [] for row in section.rows}
    workers = Workers(params, threads)
    try:
        for row in section.rows:
            workers.measure(row)  # warm-up
        for number in range(rounds):
            for row in section.rows if number % 2 else section.rows[::-1]:
                seconds[row.title].append(workers.measure(row))
            print(f"{section.title}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        workers.close()
    speeds = {row.title: [row.task.rows / value for value in seconds[row.title]] for row in section.rows}
    ratios = [
        {"of": of, "to": to, "wanted": wanted, "rounds": [a / b for a, b in zip(speeds[of], speeds[to])]}
        for of, to, wanted in section.ratios
    ]
    return {"title": section.title, "images_per_second": speeds, "ratios": ratios, "machine": machine(threads)}


def machine(threads: int) -> dict:
    """What the figures depend on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": f"{fields.get('model name', platform.processor())}, family {fields.get('cpu family', '?')}, "
        f"model {fields.get('model', '?')}",
        "has": [flag for flag in FEATURES if flag in flags],
        "lacks": [flag for flag in FEATURES if flag not in flags],
        "threads": threads,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


PREFACE = """# SE-ResNeXt-50 32x4d on PyTorch

`python -m benchmarks.torch_train`; 224 x 224 pixels, random images and labels. Images/s are medians over the rounds,
ratios the median (lowest to highest) of the ratios within a round. `hand-written` is `benchmarks/_handwritten.py`,
`graph` what `to_torch` makes of the declared graph, both channels_last with the same optimizer; `torch engine` and
`MXNet` are the engines of the trainer. `freed memory kept`: the C allocator keeps what is freed (`graph/memory.py`), as
the torch engine sets it on CPUs; so do all rows of training and inference that do not say otherwise. `timm`, where it
is installed, is its `seresnext50_32x4d`, channels_last too, with the optimizer and loss of `hand-written`. What the
other ideas did stands in `benchmarks/NOTES.md`."""
CONTENDERS = ("| contender | images/s | lowest | highest |", "|---|---|---|---|")
RATIOS = ("| ratio | median | lowest | highest | wanted |", "|---|---|---|---|---|")


def render(results: dict) -> str:
    """The results as Markdown."""
    lines = [PREFACE]
    for section in results.values():
        lines += ["", f"## {section['title']}", "", describe_machine(section["machine"]), ""]
        if "note" in section:
            lines += [section["note"]]
            continue
        rounds = len(next(iter(section["images_per_second"].values())))
        lines += [f"{rounds} alternating rounds.", "", *CONTENDERS]
        for title, speeds in section["images_per_second"].items():
            memory = section.get("peak_gib", {}).get(title)
            note = "" if memory is None else f" (peak {memory:.1f} GiB)"
            lines.append(f"| {title}{note} | {statistics.median(speeds):.2f} | {min(speeds):.2f} | {max(speeds):.2f} |")
        lines += ["", *RATIOS]
        for ratio in section["ratios"]:
            runs, wanted = ratio["rounds"], ratio["wanted"]
            figures = f"{statistics.median(runs):.3f} | {min(runs):.3f} | {max(runs):.3f}"
            lines.append(f"| {ratio['of']} / {ratio['to']} | {figures} | {wanted or ''} |")
    return "\n".join(lines) + "\n"


def describe_machine(found: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    has, lacks = ", ".join(found["has"]) or "none of them", ", ".join(found["lacks"]) or "nothing"
    return f"{found['cpu']}; {found['threads']} threads; has {has}; lacks {lacks}; {versions}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=(*SECTIONS, "gpu"), default=[*SECTIONS, "gpu"], metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=None, help="alternating rounds (default: the section's own)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every framework")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of torch_train.md and torch_train.json")
    args = parser.parse_args()
    stored = args.results / "torch_train.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "start.params"
        command = [sys.executable, "-m", "benchmarks._contenders", "prepare", str(params)]
        difference = float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(f"graph, optimized graphs and hand-written module differ by at most {difference:.1e}", flush=True)
        for name in args.only:
            if name == "gpu":
                from benchmarks._gpu import measure_gpu

                results[name] = {**measure_gpu(params, args.rounds or 5), "machine": machine(args.threads)}
            else:
                section = SECTIONS[name]()
                results[name] = measure(section, args.rounds or section.rounds, params, args.threads)
            stored.write_text(json.dumps(results, indent=1) + "\n")
            (args.results / "torch_train.md").write_text(render(results))
    print(render({name: results[name] for name in args.only}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
