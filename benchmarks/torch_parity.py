"""Every network as a PyTorch graph against MXNet: largest deviations in inference, training and gradients.

    python -m benchmarks.torch_parity -o benchmarks/results/torch_parity.md            # all, about an hour
    python -m benchmarks.torch_parity --only resnet50_v1 mobilenet                      # names that contain these

Each network runs in a process of its own, so that memory is returned and a crash costs one row. Rows that are already
in the results are kept; `--again` measures them anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

DEFAULT_RESULTS = Path(__file__).resolve().parent / "results" / "torch_parity.md"
# Two networks do not fit into 24 GiB with larger batches.
BATCHES = {"nasnet_6": 2, "": 4}
# Networks that deviate by more in float32 are compared once more, damped and with larger batches; by parts of names.
WANTED = 1e-4
DAMPED_BATCHES = {"residualattentionnet452": 8, "nasnet_6": 2, "": 16}
DAMPING = {"resnest269": 0.1, "nasnet": 0.02, "": 0.2}
# GluonCV networks that classify images; the rest of its list detects, segments, tracks or reads videos.
NOT_CLASSIFIERS = (
    *("ssd", "rcnn", "yolo", "fcn", "psp", "deeplab", "icnet", "fastscnn", "danet", "pose", "center_net", "i3d"),
    *("c3d", "p3d", "r2plus", "slowfast", "siamrpn", "monodepth", "smot", "tsn", "kinetics", "ucf", "hmdb", "sthsth"),
    *("custom", "hrnet_w18_small_v1_s", "hrnet_w18_small_v2_s", "hrnet_w48_s"),
)
# Image sizes to try, by parts of names; the first that the network takes is taken, to save time.
SIZES = {
    "cifar": (32,),
    "nasnet_6": (331,),
    "nasnet": (224,),
    "inception": (160, 299),
    "xception": (160, 299),
    "": (128, 224),
}
DECLARED = {
    "se_resnext_cifar_20": ("se_resnext", {"depth": 20, "data_type": "cifar10"}),
    "se_resnext_18": ("se_resnext", {"depth": 18}),
    "se_resnext_50_g32": ("se_resnext", {"depth": 50}),
    "se_resnet_50": ("se_resnet", {"depth": 50}),
    "se_inception_v4": ("se_inception_v4", {"drop_out": 0}),
    "se_inception_resnet_v2": ("se_inception_resnet_v2", {"drop_out": 0}),
    "resnext_50 (--no-se)": ("se_resnext", {"depth": 50, "no_se": True}),
    "resnet_50 (--no-se)": ("se_resnet", {"depth": 50, "no_se": True}),
}
COLUMNS = {
    "inference": "inference",
    "training": "training forward",
    "statistics": "moving statistics",
    "exact_outputs": "training forward, float64",
    "exact_gradients": "gradients, float64",
    "rounding": "MXNet's rounding",
    "damped": "float32, damped",
}


def names() -> list[str]:
    """The declared networks, then GluonCV's classifiers."""
    from tests.graph_checks import import_gluoncv

    zoo = import_gluoncv().model_zoo.get_model_list()
    return [*DECLARED, *sorted(name for name in zoo if not any(part in name for part in NOT_CLASSIFIERS))]


def measure(name: str) -> dict:
    """Deviations of one network, or {"refused": why}."""
    import numpy as np

    from graph.symbol_json import GraphError
    from tests.graph_checks import compare_float32, compare_network, damped_branches, zoo_symbol

    if name in DECLARED:
        from symbols import get_symbol

        network, options = DECLARED[name]
        # The logits: after a softmax that saturates, equal numbers would prove little.
        symbol = get_symbol(network, **options).get_internals()["fc1_output"]
    else:
        try:
            symbol = zoo_symbol(name)
        except Exception as error:  # whatever Gluon raises: the row reports it
            return {"refused": f"does not trace in GluonCV: {str(error).splitlines()[0][:80]}"}
    size = first_fitting_size(name, symbol)

    def inputs(rows: int) -> dict[str, np.ndarray]:
        return {"data": np.random.RandomState(0).normal(size=(rows, 3, size, size)).astype(np.float32)}

    try:
        row = {"size": size, **asdict(compare_network(symbol, inputs(chosen(BATCHES, name))))}
    except GraphError as error:
        return {"refused": str(error)[:160]}
    if float32_deviation(row) > WANTED:
        with damped_branches(chosen(DAMPING, name)):
            damped, _ = compare_float32(symbol, inputs(chosen(DAMPED_BATCHES, name)))
        row["damped"] = float32_deviation(damped)
    return row


def float32_deviation(row: dict) -> float:
    """The largest deviation in float32."""
    return max(row[key] for key in ("inference", "training", "statistics"))


def chosen(table: dict, name: str):
    """The entry whose key is part of a network's name."""
    return next(entry for part, entry in table.items() if part in name)


def first_fitting_size(name: str, symbol) -> int:
    """The first of a network's sizes for which MXNet finds all shapes; the last one otherwise."""
    from mxnet_compat import mx

    *candidates, last = chosen(SIZES, name)
    for size in candidates:
        try:
            symbol.infer_shape(data=(1, 3, size, size))
        except mx.MXNetError:
            continue
        return size
    return last


def measure_apart(name: str) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.torch_parity", "--measure", name]
    # With oneDNN MXNet 1.9.1 fails on NASNet ("could not construct a sub-memory").
    environment = {**os.environ, "MXNET_MKLDNN_ENABLED": "0"} if "nasnet" in name else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"refused": f"failed: {last[:160]}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[str, dict]) -> str:
    """The results as Markdown."""
    head = ["network", "pixels", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    refused = []
    for name, row in rows.items():
        if "refused" in row:
            refused.append(f"- {name}: {row['refused']}")
        else:
            cells = [name, str(row["size"]), *(f"{row[key]:.1e}" if key in row else "" for key in COLUMNS)]
            lines.append("| " + " | ".join(cells) + " |")
    measured = [row for row in rows.values() if "refused" not in row]
    worst = {key: max((row[key] for row in measured if key in row), default=0.0) for key in COLUMNS}
    lines.append("| **worst** | | " + " | ".join(f"{worst[key]:.1e}" for key in COLUMNS) + " |")
    return "\n".join([*lines, "", f"Not compared ({len(refused)}):", "", *refused, ""])


def report(rows: dict[str, dict], waiting: list[str]) -> str:
    import torch

    from mxnet_compat import mx

    rows_each, damped_rows, scale = BATCHES[""], DAMPED_BATCHES[""], DAMPING[""]
    exceptions = (
        f"nasnet_6_4032 {BATCHES['nasnet_6']} images; damped, {DAMPED_BATCHES['nasnet_6']}, and "
        f"residualattentionnet452 {DAMPED_BATCHES['residualattentionnet452']}; resnest269's branches are scaled to "
        f"{DAMPING['resnest269']}, NASNet's to {DAMPING['nasnet']}"
    )
    return f"""# The translated graphs against MXNet

`python -m benchmarks.torch_parity`: one run a network, batch {rows_each}, random weights and normal inputs, float32 on
a CPU ({processor()}), MXNet {mx.__version__} without its subgraph fusion (NASNet: without oneDNN, which fails on it),
PyTorch {torch.__version__}; dropout is taken out. Every number is the largest |a - b| / max |b| over all elements. For
gradients it is that of the worst parameter, where one below 0.1 % of the network's largest gradient counts relative to
that; they are compared in float64, because in float32 rounding turns single ReLUs of deep networks on or off, which
changes some gradients of both frameworks by per cents. Inference runs with the moving statistics of the batch.

MXNet's rounding is its own training forward in float32 against the same in float64 (not measured for every network):
where it is large, the network with these weights and this small batch amplifies rounding, and no two float32
implementations agree better. ResNeSt is the extreme: its attention normalises {rows_each} numbers a channel. Networks
that deviate by more than {WANTED:g} in float32 are therefore compared once more with weights that do not amplify:
residual branches scaled to {scale}, as trained ones are small beside their shortcuts, and {damped_rows} images.
The last column is the largest of the three float32 deviations then.

Exceptions: {exceptions}.

Given float64, MXNet still computes LeakyReLU's negative side (darknet53) and the weights of BilinearResize2D (residual
attention) in float32. In the float64 columns our weights of BilinearResize2D are rounded like that: without it, ReLUs
turned on or off by a difference of 1e-7 changed gradients of the residual attention networks by up to 0.15.

Measured: {len(rows)} of {len(rows) + len(waiting)} networks. Not yet: {", ".join(waiting) or "none"}.

{table(rows)}
<!-- {json.dumps(rows)} -->
"""


def processor() -> str:
    """The CPU's model as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def read_rows(path: Path) -> dict[str, dict]:
    """Rows of earlier runs, kept in the file itself."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8").rsplit("<!-- ", 1)[1].rsplit(" -->", 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=DEFAULT_RESULTS, help="Markdown file (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=None, metavar="PART", help="networks whose name contains one of these"
    )
    parser.add_argument("--again", action="store_true", help="measure rows anew that the file already holds")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows, listed = read_rows(args.output), names()
    for name in listed:
        wanted = args.only is None or any(part in name for part in args.only)
        if wanted and (args.again or name not in rows):
            rows[name] = measure_apart(name)
            print(name, rows[name], flush=True)
        ordered = {known: rows[known] for known in listed if known in rows}
        waiting = [known for known in listed if known not in rows]
        args.output.write_text(report(ordered, waiting), encoding="utf-8")


if __name__ == "__main__":
    main()
