"""Training with MXNet on a CPU: our operators and settings against the original's operators and MXNet's defaults.

    python -m benchmarks.mxnet_train                      # all rows, about ten minutes on two cores
    python -m benchmarks.mxnet_train --only SE-ResNeXt-50

Two processes stand by, one for each side, and take turns, so that a disturbance of the machine meets both. The declared
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
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "mxnet_train.json"
ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4
WARM_UP = 1
# Of the user's environment, what would take the defaults from the other side.
OURS_ALONE = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class Row:
    """One comparison: a network at a size of image and batch, and how many steps a turn takes."""

    name: str
    network: str
    options: dict
    size: int
    batch: int
    steps: int = 1


ROWS = (
    Row("SE-ResNeXt-50", "se_resnext", {"depth": 50}, 224, 16),
    Row("SE-ResNet-50", "se_resnet", {"depth": 50}, 224, 16),
    Row("SE-Inception-v4", "se_inception_v4", {}, 224, 16),
    Row("SE-ResNeXt-20, CIFAR-like (the demo)", "se_resnext", {"depth": 20, "data_type": "demo"}, 28, 64, steps=10),
)


def work(row: Row, ours: bool) -> None:
    """The worker: for every line on stdin train some steps and print their seconds; at the end the peak memory."""
    import resource

    import numpy as np

    from graph.cpu_training import for_cpu_training
    from mxnet_compat import mx
    from symbols import get_symbol_json

    json_text = get_symbol_json(row.network, **row.options, image_size=row.size)
    symbol = mx.sym.load_json(for_cpu_training(json_text) if ours else json_text)
    module = mx.mod.Module(symbol, context=mx.cpu())
    module.bind([("data", (row.batch, 3, row.size, row.size))], [("softmax_label", (row.batch,))])
    mx.random.seed(0)
    module.init_params(mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2))
    optimizer = {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "wd": WEIGHT_DECAY}
    module.init_optimizer("device", "nag", optimizer)
    random = np.random.default_rng(0)
    classes = module.output_shapes[0][1][1]
    images = mx.nd.array(random.uniform(0, 255, (row.batch, 3, row.size, row.size)))
    batch = mx.io.DataBatch([images], [mx.nd.array(random.integers(classes, size=row.batch))])
    print("ready", flush=True)
    for line in sys.stdin:
        mx.nd.waitall()
        start = time.perf_counter()
        for _ in range(int(line)):
            module.forward(batch, is_train=True)
            module.backward()
            module.update()
        mx.nd.waitall()
        print(time.perf_counter() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


class Worker:
    """A process that trains when told to."""

    def __init__(self, row: Row, ours: bool):
        from mxnet_settings import recommended_environment

        environment = {key: value for key, value in os.environ.items() if key not in OURS_ALONE}
        environment.update(recommended_environment() if ours else {}, MXNET_SUBGRAPH_VERBOSE="0")
        command = [sys.executable, "-m", "benchmarks.mxnet_train", "--worker", json.dumps([asdict(row), ours])]
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
    """Images/s of both sides, median over the turns, their ratio turn by turn, and peak memory."""
    sides = {"original": Worker(row, ours=False), "ours": Worker(row, ours=True)}
    for worker in sides.values():
        worker.train(WARM_UP)
    seconds = {name: [] for name in sides}
    for turn in range(turns):
        for name, worker in sides.items():
            seconds[name].append(worker.train(row.steps))
            print(f"{row.name}: turn {turn + 1}/{turns}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    images = row.batch * row.steps
    ratios = [slow / fast for slow, fast in zip(seconds["original"], seconds["ours"])]
    return {
        "name": row.name,
        "size": row.size,
        "batch": row.batch,
        "turns": turns,
        "steps_per_turn": row.steps,
        "images_per_second": {name: images / statistics.median(times) for name, times in seconds.items()},
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "peak_mb": {name: worker.finish() for name, worker in sides.items()},
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
    """The results as JSON and, beside it, as a table."""
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    lines = [
        "# Training with MXNet 1.9.1 on a CPU",
        "",
        "Original: the original's operators and MXNet's defaults. Ours: the same graph rewritten by "
        "`graph/cpu_training.py`, and `mxnet_settings.py`. Forward, backward and update (NAG), float32, random labels; "
        "two processes that take turns, medians; in brackets the lowest and the highest ratio of a turn; steps: "
        "turns x steps a turn, after one to warm up.",
        "",
        "    python -m benchmarks.mxnet_train",
        "",
        f"{machine}.",
        "",
        "| network | pixels | batch | original, img/s | ours, img/s | ratio | original, MB | ours, MB | steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, peak = row["images_per_second"], row["peak_mb"]
        ratio, low, high = row["ratio"]
        lines.append(
            f"| {row['name']} | {row['size']} | {row['batch']} | {speed['original']:.2f} | {speed['ours']:.2f} | "
            f"{ratio:.2f} ({low:.2f}-{high:.2f}) | {peak['original']:.0f} | {peak['ours']:.0f} | "
            f"{row['turns']} x {row['steps_per_turn']} |"
        )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mxnet_train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--turns", type=int, default=3, help="how often each side trains (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        row, ours = json.loads(args.worker)
        work(Row(**row), ours)
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
