"""Several devices by measurement and on paper.

Measured: images/s of one and two CPU devices of this machine for both frameworks, each in processes of its own that
take turns, with so many threads a device that all devices together have the cores. On paper: a model of the time of an
update from the speed of one device, the bytes that are reduced, the links and the loader, for 8, 64 and 512 GPUs.

    python -m benchmarks.scaling                  # both, about five minutes on two cores
    python -m benchmarks.scaling --paper-only     # the model and its plot; the measured rows stay as they are
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import HelpFormatter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NETWORK_FLAGS = ("--network", "se_resnext", "--depth", "18", "--image-size", "64", "--data-type", "imagenet")
CLASSES, ROWS_A_DEVICE, LEARNING_RATE = 1000, 16, 1e-4
WARM_SECONDS, MEASURED_SECONDS = 1.5, 4.0
FLOAT_BYTES = 4
# Rounds of a setup on a quiet machine differ by less than this ratio.
DISTURBED = 1.3


@dataclass(frozen=True)
class Setup:
    """One way to train: flags of the training command, what starts its processes, devices in all, threads of each."""

    name: str
    flags: tuple[str, ...]
    launcher: tuple[str, ...]
    devices: int
    threads: int


def setups(cores: int) -> list[Setup]:
    """For each framework: one device on all cores, one on half of them, two on half of them each."""
    half = max(1, cores // 2)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    server = ("-m", "training.launch", "-n", "2", "-s", "1", "--", sys.executable)
    mxnet, torch = ("--engine", "symbol"), ("--engine", "torch")
    return [
        Setup("MXNet, 1 context", mxnet, (), 1, cores),
        Setup("MXNet, 1 context on half of the cores", mxnet, (), 1, half),
        Setup("MXNet, 2 contexts, kvstore device", (*mxnet, "--cpus", "2"), (), 2, half),
        Setup("MXNet, 2 workers and a server, dist_sync", (*mxnet, "--kv-store", "dist_sync"), server, 2, half),
        Setup("PyTorch, 1 process", torch, (), 1, cores),
        Setup("PyTorch, 1 process on half of the cores", torch, (), 1, half),
        Setup("PyTorch, 2 processes, gloo", torch, torchrun, 2, half),
    ]


def work(flags: Sequence[str]) -> None:
    """The worker: train on made images for some seconds; the first process prints images/s of all devices."""
    import numpy as np

    from engine_choice import join_group, make_engine, prepare_process
    from engines.base import Batch
    from networks import declare
    from training.initializer import initial_state
    from training.options import parse_args

    args = parse_args(list(flags))
    with join_group(args) as group:
        prepare_process(args)
        network = declare(args, CLASSES)
        engine = make_engine(args, network, group)
        engine.set_state(initial_state(network.shapes, seed=0))
        rng, rows = np.random.default_rng(group.rank), args.batch_size // group.size
        images = rng.integers(0, 256, (rows, *network.image_shape), dtype=np.uint8)
        # Random labels: constant ones lead to denormal gradients, which are slow.
        batch = Batch(images, rng.integers(0, CLASSES, rows))
        _train_for(WARM_SECONDS, engine, batch, group)
        updates, seconds = _train_for(MEASURED_SECONDS, engine, batch, group)
        engine.close()
        if group.leads:
            print(json.dumps({"rate": updates * args.batch_size / seconds, "parameters": network.parameters}))


def _train_for(limit: float, engine, batch, group) -> tuple[int, float]:
    """Updates done together in about `limit` seconds, and the seconds they took."""
    start, updates = time.perf_counter(), 0
    # The first process decides when it is over; its clock is as good as any.
    while group.sum([group.leads and time.perf_counter() - start > limit])[0] == 0:
        engine.train_batch(batch, LEARNING_RATE, len(batch.labels) * group.size)
        engine.read_metrics()
        updates += 1
    return updates, time.perf_counter() - start


def measure(setup: Setup) -> dict:
    """Run one setup once; images/s and the network's parameters."""
    flags = [*NETWORK_FLAGS, *setup.flags, "--batch-size", str(ROWS_A_DEVICE * setup.devices)]
    command = [sys.executable, *setup.launcher, str(ROOT / "benchmarks" / "scaling.py"), "--work", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{setup.name} failed:\n{done.stderr}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def measure_all(rounds: int) -> dict:
    """All setups in turn, so many times; medians and what they mean."""
    cores = len(os.sched_getaffinity(0))
    table = setups(cores)
    rates: dict[str, list[float]] = {setup.name: [] for setup in table}
    for number in range(rounds):
        for setup in table:
            result = measure(setup)
            rates[setup.name].append(result["rate"])
            print(f"round {number + 1}: {setup.name}: {result['rate']:.1f} images/s", file=sys.stderr)
    rows = [
        {"name": s.name, "devices": s.devices, "threads": s.threads, "rates": [round(r, 2) for r in rates[s.name]]}
        for s in table
    ]
    return {
        "cores": cores, "processor": processor(), "rounds": rounds, "parameters": result["parameters"],
        "rows_a_device": ROWS_A_DEVICE, "network": " ".join(NETWORK_FLAGS), "rows": rows,
    }  # fmt: skip


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------------- on paper


@dataclass(frozen=True)
class Cluster:
    """Machines of `gpus` GPUs: bandwidth of all-reduce inside (bytes/s a GPU) and of the network (bytes/s a machine,
    each direction), seconds that a ring's step takes whatever its size, images/s that the loader of a machine makes."""

    name: str
    gpus: int
    inside: float
    network: float
    latency: float
    loader: float


@dataclass(frozen=True)
class Job:
    """What one GPU does alone: images/s at `rows` images an update; parameters of the network."""

    name: str
    speed: float
    rows: int
    parameters: int


# Of the backward pass, two thirds of the arithmetic, gradients come bucket by bucket while it runs (25 MB, PyTorch's
# default), so that all but the last bucket can be reduced meanwhile.
BACKWARD_SHARE, BUCKET_BYTES = 2 / 3, 25e6


def all_reduce_seconds(cluster: Cluster, gpus: int, size: float) -> float:
    """A ring inside each machine, rings between machines: 2 (n - 1) / n of the bytes pass every link."""
    inside, machines = min(gpus, cluster.gpus), -(-gpus // cluster.gpus)
    seconds = 2 * (inside - 1) / inside * size / cluster.inside
    seconds += 2 * (machines - 1) / machines * size / cluster.network
    return seconds + 2 * (gpus - 1 if machines == 1 else inside + machines - 2) * cluster.latency


def server_seconds(cluster: Cluster, gpus: int, size: float) -> float:
    """A parameter server on every machine: gradients are summed inside it, then sent to the servers and back.

    Every machine sends what other machines' servers hold; its own server receives as much at the same time, and the
    other way round on the way back. So as many bytes pass a link in each direction as in a ring.
    """
    machines = -(-gpus // cluster.gpus)
    inside = min(gpus, cluster.gpus)
    seconds = 2 * (inside - 1) / inside * size / cluster.inside + 2 * (machines - 1) / machines * size / cluster.network
    return seconds + 2 * (inside - 1 + (machines > 1)) * cluster.latency


def step_seconds(job: Job, cluster: Cluster, gpus: int, *, servers: bool = False) -> float:
    """Seconds of an update: arithmetic, what of the reduction does not hide behind it, or the loader if that is slower.

    MXNet's dist_sync pushes while the backward pass runs too, but an update needs all gradients back.
    """
    compute, size = job.rows / job.speed, FLOAT_BYTES * job.parameters
    reduce = server_seconds(cluster, gpus, size) if servers else all_reduce_seconds(cluster, gpus, size)
    last = min(1.0, BUCKET_BYTES / size)
    hidden = BACKWARD_SHARE * compute
    exposed = max(reduce * last, reduce - hidden)
    loader = job.rows * min(gpus, cluster.gpus) / cluster.loader
    return max(compute + exposed, loader) if gpus > 1 else max(compute, job.rows / cluster.loader)


# 1,150 images/s a core (benchmarks/results/loader.md: 2,304 with two threads, augmentation level 2).
LOADER_A_CORE = 1150
# Speeds of one A100 with 80 GB: published by NVIDIA for SE-ResNeXt-101 32x4d in its DeepLearningExamples, which give
# 2,991 (TF32) and 5,779 (AMP) for 8 GPUs. The batches are assumed.
PARAMETERS_101 = 48_955_422
JOBS = (Job("AMP", 855, 256, PARAMETERS_101), Job("TF32", 395, 128, PARAMETERS_101))
PUBLISHED_8 = {"AMP": 5779, "TF32": 2991}
# NVLink 3: 600 GB/s a GPU both directions, about 230 GB/s reach an all-reduce. Networks at 90 % of their nominal rate.
CLUSTERS = (
    Cluster("8 x 200 Gb/s InfiniBand", 8, 230e9, 0.9 * 200e9, 10e-6, 64 * LOADER_A_CORE),
    Cluster("100 Gb/s Ethernet", 8, 230e9, 0.9 * 12.5e9, 30e-6, 64 * LOADER_A_CORE),
    Cluster("10 Gb/s Ethernet", 8, 230e9, 0.9 * 1.25e9, 30e-6, 64 * LOADER_A_CORE),
)
COUNTS = (8, 64, 512)
CAPTION = (
    "Model, not a measurement. One A100: 855 images/s with AMP, 395 with TF32, taken as 256 and 128 images an update "
    "(rates published by NVIDIA for SE-ResNeXt-101 32x4d, 49.0 M parameters, 196 MB of float32 gradients). Machines of "
    "8 GPUs, NVLink at 230 GB/s, networks at 90 % of nominal in both directions at once, 10 us (InfiniBand) or 30 us "
    "a step of a ring; all-reduce in buckets of 25 MB behind the backward pass (2/3 of the arithmetic); dist_sync with "
    "a server on every machine; loader 64 cores x 1,150 images/s a machine. Stragglers, memory traffic of the "
    "reduction and the servers' own sums are left out: the published 8-GPU rates are 84 % (AMP) and 95 % (TF32) of 8 "
    "times one GPU, the model says nearly 100 %; it is the most that the links allow."
)


def predictions(jobs: Sequence[Job]) -> list[dict]:
    """Images/s and efficiency for every job, cluster, way of reducing and number of GPUs."""
    found = []
    for job in jobs:
        for cluster in CLUSTERS:
            for servers in (False, True):
                for gpus in COUNTS:
                    rate = gpus * job.rows / step_seconds(job, cluster, gpus, servers=servers)
                    how = "dist_sync" if servers else "all-reduce"
                    efficiency = rate / (gpus * job.speed)
                    found.append(
                        {"job": job.name, "cluster": cluster.name, "how": how, "gpus": gpus, "rate": rate,
                         "efficiency": efficiency}
                    )  # fmt: skip
    return found


def draw(path: Path) -> None:
    """Efficiency against the number of GPUs, a line for every network and way of reducing."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(JOBS), figsize=(11, 5.6), sharey=True)
    counts = [2**power for power in range(10)]
    for job, one in zip(JOBS, axes):
        for colour, cluster in enumerate(CLUSTERS):
            for servers, style in ((False, "-"), (True, "--")):
                rates = [job.rows / step_seconds(job, cluster, gpus, servers=servers) / job.speed for gpus in counts]
                label = f"{cluster.name}, {'dist_sync' if servers else 'all-reduce'}"
                one.plot(counts, rates, style, color=f"C{colour}", marker="o", markersize=3, label=label)
        one.plot([8], [PUBLISHED_8[job.name] / 8 / job.speed], "k*", markersize=10, label="published for 8 GPUs")
        one.set(title=f"SE-ResNeXt-101, {job.name}", xscale="log", xlabel="GPUs", ylim=(0, 1.05))
        one.set_xticks(counts, [str(count) for count in counts])
        one.grid(alpha=0.3)
    axes[0].set_ylabel("images/s, part of n times one GPU")
    axes[1].legend(fontsize=8, loc="lower left")
    figure.text(0.02, 0.01, textwrap.fill(CAPTION, 185), fontsize=7.5, va="bottom")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------- the report


def report(measured: dict) -> str:
    """The results as Markdown."""
    size = FLOAT_BYTES * measured["parameters"] / 1e6
    lines = [
        "# Several devices",
        "",
        f"`python -m benchmarks.scaling`, {measured['processor']}, {measured['cores']} cores, "
        f"{measured['rounds']} rounds in which all rows took turns, each a process (or several) of its own, "
        f"{MEASURED_SECONDS:g} s after {WARM_SECONDS:g} s of warm-up. `{measured['network']}`, "
        f"{measured['rows_a_device']} images a device and update, made pixels, random labels, no loader.",
        "",
        "| setup | threads a device | images/s, median | lowest | highest | part of 2 x one device on half the cores "
        "| of one device on all cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["rows"]:
        middle, low, high = statistics.median(row["rates"]), min(row["rates"]), max(row["rates"])
        half, whole = _parts(row, measured["rows"]) if row["devices"] == 2 else ("", "")
        lines.append(f"| {row['name']} | {row['threads']} | {middle:.1f} | {low:.1f} | {high:.1f} | {half} | {whole} |")
    lines += [
        "",
        "Parts are the median (lowest to highest) over the rounds; the first is the efficiency. The devices share one",
        "memory bus and its cache and, for dist_sync, the cores with server and scheduler. None of this says anything",
        "of a cluster.",
        *_disturbance(measured["rows"]),
        "",
        f"Bytes reduced: {measured['parameters']:,} parameters are {size:.1f} MB of float32 gradients an update. A",
        f"ring of n sends and receives 2 (n - 1) / n of that in every process: {size:.1f} MB for 2, up to "
        f"{2 * size:.1f} MB",
        "for many. A worker of the parameter server sends all of it to the servers and receives as much.",
        "",
        "## On paper: 8, 64 and 512 GPUs",
        "",
        "![Efficiency over the number of GPUs](scaling.png)",
        "",
        CAPTION,
        "",
        "Step = arithmetic + max(last bucket, reduction - backward pass), or the loader's time if that is longer. With",
        "dist_sync machines are clients and servers at once, and their links carry as much in each direction as in a",
        "ring; with fewer servers than machines (the launcher's default is one) the servers' links carry a multiple:",
        "m machines and s servers take m / s times as long for it. MXNet 1.9.1 runs on A100s in TF32, not with AMP as",
        "here; --speed and --rows put the figures of another GPU in their place.",
        "",
        *paper(JOBS),
    ]
    return "\n".join(lines) + "\n"


def _parts(row: dict, rows: Sequence[dict]) -> tuple[str, str]:
    """Rate of two devices as part of twice one on half of the cores, and of one on all: rounds are compared alone."""
    single = [other for other in rows if other["devices"] == 1 and _framework(other) == _framework(row)]
    alone = {other["threads"]: other for other in single}
    found = []
    for other, devices in ((alone[min(alone)], 2), (alone[max(alone)], 1)):
        parts = [rate / devices / one for rate, one in zip(row["rates"], other["rates"])]
        found.append(f"{statistics.median(parts):.0%} ({min(parts):.0%} to {max(parts):.0%})")
    return found[0], found[1]


def _disturbance(rows: Sequence[dict]) -> list[str]:
    """A warning where the rounds of a setup differ so much that something else wanted the cores."""
    spread = max(max(row["rates"]) / min(row["rates"]) for row in rows)
    if spread < DISTURBED:
        return []
    return ["", f"**Other work ran meanwhile: rounds of a setup differ up to {spread:.1f} times; parts say little.**"]


def _framework(row: dict) -> str:
    return row["name"].split(",")[0]


def paper(jobs: Sequence[Job]) -> list[str]:
    """The model's table, line by line."""
    lines = [
        "| precision | network of the machines | how | " + " | ".join(f"{count} GPUs" for count in COUNTS) + " |",
        "|---|---|---|" + "---|" * len(COUNTS),
    ]
    found = predictions(jobs)
    for start in range(0, len(found), len(COUNTS)):
        row = found[start : start + len(COUNTS)]
        cells = " | ".join(f"{cell['rate']:,.0f} images/s ({cell['efficiency']:.0%})" for cell in row)
        lines.append(f"| {row[0]['job']} | {row[0]['cluster']} | {row[0]['how']} | {cells} |")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often every setup is measured")
    parser.add_argument("--paper-only", action="store_true", help="measure nothing, take the rows that are there")
    parser.add_argument("--speed", type=float, help="print the model alone, for one GPU of so many images/s")
    parser.add_argument("--rows", type=int, default=256, help="with --speed: images a GPU and update")
    parser.add_argument("--parameters", type=int, default=PARAMETERS_101, help="with --speed: of the network")
    args = parser.parse_args()
    if args.speed:
        print("\n".join(paper([Job("given", args.speed, args.rows, args.parameters)])))
        return
    rows = RESULTS / "scaling.json"
    if not args.paper_only:
        rows.write_text(json.dumps(measure_all(args.rounds), indent=1) + "\n")
    (RESULTS / "scaling.md").write_text(report(json.loads(rows.read_text())))
    draw(RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
