"""Training with MXNet on a CPU: the original's operators and GluonCV's network against ours.

    python -m benchmarks.mxnet_train                      # all rows, about 15 minutes on two cores
    python -m benchmarks.mxnet_train --only SE-ResNeXt-50

A process stands by for each side, and they take turns, so that a disturbance of the machine meets all. The declared
graph has the operators of the original, node by node (global Pooling, Flatten, broadcast_mul), so it is the original's
side as it is; ours is the same graph rewritten by graph.cpu_training, in a process set up by mxnet_settings. Labels are
random and the rate is small: constant labels or a diverged network make denormal gradients, with which MXNet's kernels
are 30 to 50 times slower. Rows that are not asked for stay in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "mxnet_train.json"
ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4
WARM_UP = 1
CLASSES = 1000
# Of the user's environment, what would take the defaults from the other side.
OURS_ALONE = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "DNNL_MAX_CPU_ISA")
# The sides, as the results name them.
OURS, ORIGINAL = "ours", "original"
HYBRID, IMPERATIVE = "ours, hybridized", "ours, not hybridized"
PEER, TUNED_PEER = "GluonCV, MXNet's defaults", "GluonCV, our settings"


@dataclass(frozen=True)
class Row:
    """One comparison: a network at a size of image and batch, and how many steps a turn takes.

    sides: keys of SIDES; the first one's speed is divided by that of each of the others.
    """

    name: str
    network: str
    options: dict
    size: int
    batch: int
    steps: int = 1
    sides: tuple[str, ...] = (OURS, ORIGINAL)


ROWS = (
    Row("SE-ResNeXt-50", "se_resnext", {"depth": 50}, 224, 16),
    Row("SE-ResNet-50", "se_resnet", {"depth": 50}, 224, 16),
    Row("SE-Inception-v4", "se_inception_v4", {}, 224, 16),
    Row("SE-ResNeXt-20, CIFAR-like (the demo)", "se_resnext", {"depth": 20, "data_type": "demo"}, 28, 64, steps=10),
    Row("Gluon, SE-ResNeXt-50", "se_resnext", {"depth": 50}, 224, 16, sides=(HYBRID, IMPERATIVE, PEER, TUNED_PEER)),
)


def random_batch(row: Row, classes: int):
    """The (images, labels) that every step of every side trains on, as numpy arrays: 0-255 and class numbers."""
    import numpy as np

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (row.batch, 3, row.size, row.size), "uint8")
    return images, random.integers(classes, size=row.batch)


def module_step(row: Row, rewritten: bool) -> Callable[[], None]:
    """A step of MXNet's Module on the declared graph, or on what graph.cpu_training makes of it."""
    from graph.cpu_training import for_cpu_training
    from mxnet_compat import mx
    from symbols import get_symbol_json

    json_text = get_symbol_json(row.network, **row.options, image_size=row.size)
    symbol = mx.sym.load_json(for_cpu_training(json_text) if rewritten else json_text)
    module = mx.mod.Module(symbol, context=mx.cpu())
    module.bind([("data", (row.batch, 3, row.size, row.size))], [("softmax_label", (row.batch,))])
    mx.random.seed(0)
    module.init_params(mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2))
    optimizer = {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "wd": WEIGHT_DECAY}
    module.init_optimizer("device", "nag", optimizer)
    images, labels = random_batch(row, module.output_shapes[0][1][1])
    batch = mx.io.DataBatch([mx.nd.array(images, dtype="float32")], [mx.nd.array(labels)])

    def step() -> None:
        module.forward(batch, is_train=True)
        module.backward()
        module.update()

    return step


def engine_step(row: Row, hybridize: bool) -> Callable[[], None]:
    """A step of the trainer's Gluon engine, conversion of the images to float32 included."""
    from engines.base import Batch
    from engines.gluon_engine import GluonEngine
    from gluon import get_network
    from graph.shapes import parameter_shapes
    from graph.symbol_json import parse
    from mxnet_compat import mx
    from symbols import get_symbol_json
    from training.initializer import initial_state

    graph = parse(get_symbol_json(row.network, **row.options, image_size=row.size))
    shapes = parameter_shapes(graph, {"data": (1, 3, row.size, row.size), "softmax_label": (1,)})
    net = get_network(row.network, **row.options)
    engine = GluonEngine(net, [mx.cpu()], momentum=MOMENTUM, wd=WEIGHT_DECAY, hybridize=hybridize)
    engine.set_state(initial_state(shapes, seed=0))
    images, labels = random_batch(row, CLASSES)
    return lambda: engine.train_batch(Batch(images, labels), LEARNING_RATE)


def peer_step(row: Row) -> Callable[[], None]:
    """A step of GluonCV's se_resnext50_32x4d, hybridized, as GluonCV's own training scripts do it."""
    from gluon.zoo import gluoncv_network
    from mxnet_compat import mx

    import mxnet.gluon as mxgluon  # isort: skip - after mxnet_compat

    net = gluoncv_network("se_resnext50_32x4d", CLASSES).network
    mx.random.seed(0)
    net.initialize(mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2))
    net.hybridize(static_alloc=True, static_shape=True)
    cross_entropy = mxgluon.loss.SoftmaxCrossEntropyLoss()
    optimizer = {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "wd": WEIGHT_DECAY}
    trainer = mxgluon.Trainer(net.collect_params(), "nag", optimizer)
    images, labels = random_batch(row, CLASSES)
    # GluonCV's networks take normalised pixels.
    data, label = (mx.nd.array(images, dtype="float32") - 127.5) / 73.6, mx.nd.array(labels)

    def step() -> None:
        with mx.autograd.record():
            loss = cross_entropy(net(data), label)
        loss.backward()
        trainer.step(row.batch)

    return step


@dataclass(frozen=True)
class Side:
    """Who takes part: what makes its step, and whether its process is set up as mxnet_settings recommends."""

    make_step: Callable[[Row], Callable[[], None]]
    tuned: bool


SIDES = {
    OURS: Side(lambda row: module_step(row, rewritten=True), tuned=True),
    ORIGINAL: Side(lambda row: module_step(row, rewritten=False), tuned=False),
    HYBRID: Side(lambda row: engine_step(row, hybridize=True), tuned=True),
    IMPERATIVE: Side(lambda row: engine_step(row, hybridize=False), tuned=True),
    PEER: Side(peer_step, tuned=False),
    TUNED_PEER: Side(peer_step, tuned=True),
}


def work(row: Row, side: str) -> None:
    """The worker: for every line on stdin train some steps and print their seconds; at the end the peak memory."""
    import resource

    from mxnet_compat import mx

    step = SIDES[side].make_step(row)
    print("ready", flush=True)
    for line in sys.stdin:
        mx.nd.waitall()
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        mx.nd.waitall()
        print(time.perf_counter() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


class Worker:
    """A process that trains when told to."""

    def __init__(self, row: Row, side: str):
        from mxnet_settings import recommended_environment

        environment = {key: value for key, value in os.environ.items() if key not in OURS_ALONE}
        environment.update(recommended_environment() if SIDES[side].tuned else {}, MXNET_SUBGRAPH_VERBOSE="0")
        command = [sys.executable, "-m", "benchmarks.mxnet_train", "--worker", json.dumps([asdict(row), side])]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read("ready")

    def train(self, steps: int) -> float:
        """Seconds that `steps` steps took."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._read("a time"))

    def finish(self) -> float:
        """End the process; its peak memory in MB."""
        self._process.stdin.close()
        peak = float(self._read("its peak memory")) / 1024
        self._process.wait()
        return peak

    def _read(self, what: str) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a worker ended before it said {what}; see above")
        return line


def compare(row: Row, turns: int) -> dict:
    """Images/s of every side, median over the turns, the first one's ratio to it turn by turn, and peak memory."""
    workers = {side: Worker(row, side) for side in row.sides}
    for worker in workers.values():
        worker.train(WARM_UP)
    seconds = {side: [] for side in workers}
    for turn in range(turns):
        for side, worker in workers.items():
            seconds[side].append(worker.train(row.steps))
            print(f"{row.name}: turn {turn + 1}/{turns}, {side}: {seconds[side][-1]:.2f} s", file=sys.stderr)
    images = row.batch * row.steps
    first, *others = row.sides
    ratios = {side: [slow / fast for slow, fast in zip(seconds[side], seconds[first])] for side in others}
    return {
        "name": row.name,
        "size": row.size,
        "batch": row.batch,
        "turns": turns,
        "steps_per_turn": row.steps,
        "images_per_second": {side: images / statistics.median(times) for side, times in seconds.items()},
        "ratio": {side: [statistics.median(each), min(each), max(each)] for side, each in ratios.items()},
        "peak_mb": {side: worker.finish() for side, worker in workers.items()},
    }


def processor() -> str:
    """Model, processors and the vector instructions that oneDNN can choose from, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    flags = [flag for flag in known if flag in found.get("flags", "").split()]
    family = f"family {found.get('cpu family')}, model {found.get('model')}"
    return f"{found.get('model name')} ({family}), {len(os.sched_getaffinity(0))} processors, {' '.join(flags)}"


def write(rows: list[dict], machine: str, path: Path) -> None:
    """The results as JSON and, beside it, as tables."""
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    by_name = {row["name"]: row for row in rows}
    measured = [(row, by_name[row.name]) for row in ROWS if row.name in by_name]
    lines = [
        "# Training with MXNet 1.9.1 on a CPU",
        "",
        "Forward, backward and update (NAG), float32, random labels; processes that take turns, medians; in brackets "
        "the lowest and the highest ratio of a turn; steps: turns x steps a turn, after one to warm up.",
        "",
        "    python -m benchmarks.mxnet_train",
        "",
        f"{machine}.",
        "",
        "Original: the original's operators and MXNet's defaults. Ours: the same graph rewritten by "
        "`graph/cpu_training.py`, and `mxnet_settings.py`.",
        "",
        "| network | pixels | batch | original, img/s | ours, img/s | ratio | original, MB | ours, MB | steps |",
        "|---|---|---|---|---|---|---|---|---|",
        *(original_line(found) for row, found in measured if row.sides == (OURS, ORIGINAL)),
    ]
    for row, found in measured:
        if row.sides != (OURS, ORIGINAL):
            lines += ["", *side_lines(found)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def show_ratio(ratio: list[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def original_line(found: dict) -> str:
    """A row of ours against the original, as one line."""
    speed, peak = found["images_per_second"], found["peak_mb"]
    return (
        f"| {found['name']} | {found['size']} | {found['batch']} | {speed[ORIGINAL]:.2f} | {speed[OURS]:.2f} | "
        f"{show_ratio(found['ratio'][ORIGINAL])} | {peak[ORIGINAL]:.0f} | {peak[OURS]:.0f} | "
        f"{found['turns']} x {found['steps_per_turn']} |"
    )


def side_lines(found: dict) -> list[str]:
    """A row of several sides, as a table with a line for each."""
    first = next(iter(found["images_per_second"]))
    lines = [
        f"{found['name']}, {found['size']} pixels, batch {found['batch']}, {found['turns']} x "
        f"{found['steps_per_turn']} steps. GluonCV: its `se_resnext50_32x4d`, hybridized with static memory.",
        "",
        f"| side | img/s | {first} / it | MB |",
        "|---|---|---|---|",
    ]
    for side, speed in found["images_per_second"].items():
        ratio = show_ratio(found["ratio"][side]) if side in found["ratio"] else ""
        lines.append(f"| {side} | {speed:.2f} | {ratio} | {found['peak_mb'][side]:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mxnet_train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--turns", type=int, default=3, help="how often each side trains (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        row, side = json.loads(args.worker)
        work(Row(**row), side)
        return
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    rows = {row["name"]: row for row in known}
    for row in ROWS:
        if any(text in row.name for text in args.only):
            rows[row.name] = compare(row, args.turns)
            write([rows[r.name] for r in ROWS if r.name in rows], processor(), args.output)
    print(args.output.with_suffix(".md").read_text(), end="")


if __name__ == "__main__":
    main()
