"""Packing against MXNet's own tool, mxnet/tools/im2rec.py, with the same number of workers.

Photograph-like JPEGs of about 500 pixels are made, resized to a short edge of 256 and packed; the commands alternate,
each measured whole, as a user runs it. Then packing without change, against copying the same bytes; and the most memory
that a command and its processes hold, for a quarter and for all of the images.

    python -m benchmarks.im2rec
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_prep.turbojpeg import has_library

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((375, 500), (500, 375), (333, 500))
# Different pictures are slow to make; the files repeat, their number is what the benchmark asks for.
DIFFERENT = 500
RESIZE = 256
_POLL_SECONDS = 0.02

# The tool runs behind the shim that lets MXNet 1.9.1 be imported with a current numpy.
_RUN_TOOL = """
import runpy, sys
from mxnet_compat import mx
from pathlib import Path
tool = str(Path(mx.__file__).parent / "tools" / "im2rec.py")
sys.argv[0] = tool
runpy.run_path(tool, run_name="__main__")
"""


def make_images(folder: Path, count: int, quality: int) -> float:
    """Write `count` JPEGs (4:2:0) into `folder`; returns their mean size in KB."""
    import simplejpeg

    from benchmarks._pictures import synthetic_photograph

    folder.mkdir()
    rng, pictures, total = np.random.default_rng(0), [], 0
    for number in range(count):
        if number < DIFFERENT:
            picture = synthetic_photograph(rng, *SIZES[number % len(SIZES)])
            pictures.append(simplejpeg.encode_jpeg(picture, quality=quality, colorspace="RGB", colorsubsampling="420"))
        data = pictures[number % DIFFERENT]
        (folder / f"{number:06d}.jpg").write_bytes(data)
        total += len(data)
    return total / count / 1000


def write_list(path: Path, count: int) -> None:
    """A list of the first `count` images in a fixed random order."""
    order = np.random.RandomState(0).permutation(count)
    path.write_text("".join(f"{key}\t{key % 1000:f}\t{key:06d}.jpg\n" for key in order))


def command(contender: str, folder: Path, workers: int, options: list[str]) -> list[str]:
    """The command line of a contender, "ours" or "mxnet", for FOLDER/<contender>.lst."""
    start = ["-m", "data_prep", "im2rec"] if contender == "ours" else ["-c", _RUN_TOOL]
    arguments = [str(folder / contender), str(folder / "images"), "--num-thread", str(workers), *options]
    return [sys.executable, *start, *arguments]


def run(arguments: list[str], folder: Path) -> float:
    """Seconds that a command takes from start to end; what an earlier one packed in `folder` is deleted before."""
    for path in folder.glob("*.rec"):
        path.unlink()
    start = time.perf_counter()
    subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def copy(folder: Path, count: int) -> float:
    """Seconds to read the image files one by one and write their bytes into one file, flushed to disk."""
    start = time.perf_counter()
    with open(folder / "copy.bin", "wb") as target:
        for number in range(count):
            target.write((folder / "images" / f"{number:06d}.jpg").read_bytes())
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - start


def peak_memory(arguments: list[str]) -> float:
    """Most MB that a command and its processes hold together, shared pages divided among them (PSS, polled)."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(_pss(pid) for pid in _session(process.pid)))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {' '.join(arguments[:4])} ...")
    return peak


def _session(leader: int) -> list[str]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(entry)
    return found


def _pss(pid: str) -> float:
    try:
        lines = Path("/proc", pid, "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


def measure_resize(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """images/s of both contenders, ours in both its ways, alternating, and the ratios of every round."""
    resize = ["--resize", str(RESIZE)]
    ways = {"ours": ("ours", resize), "mxnet": ("mxnet", resize)}
    if has_library():
        ways["yuv_planes"] = ("ours", [*resize, "--yuv-planes"])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            contender, options = ways[name]
            rates[name].append(args.images / run(command(contender, folder, args.workers, options), folder))
        print(f"round {number + 1}: " + ", ".join(f"{name} {rates[name][-1]:.0f}/s" for name in rates), flush=True)
    result: dict[str, object] = {"images_per_second": rates}
    for name in (name for name in rates if name != "mxnet"):
        ratios = [ours / theirs for ours, theirs in zip(rates[name], rates["mxnet"])]
        result[f"{name}_against_mxnet"] = {"median": statistics.median(ratios), "ratios": ratios}
    return result


def measure_pass_through(folder: Path, args: argparse.Namespace, kilobytes: float) -> dict[str, list[float]]:
    """MB/s of packing without change, by both contenders, and of copying the same bytes."""
    whole = args.images * kilobytes / 1000
    kinds = {"decode": ["--pass-through"], "markers": ["--pass-through", "--check", "markers"]}
    rates: dict[str, list[float]] = {name: [] for name in (*kinds, "mxnet", "copy")}
    for _ in range(args.rounds):
        for name, options in kinds.items():
            rates[name].append(whole / run(command("ours", folder, args.workers, options), folder))
        rates["mxnet"].append(whole / run(command("mxnet", folder, args.workers, ["--pass-through"]), folder))
        rates["copy"].append(whole / copy(folder, args.images))
    return rates


def measure_memory(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Peak MB of both contenders for a quarter of the images and for all of them."""
    peaks: dict[str, list[float]] = {"ours": [], "mxnet": []}
    for count in (args.images // 4, args.images):
        for contender in peaks:
            write_list(folder / f"{contender}.lst", count)
            peaks[contender].append(peak_memory(command(contender, folder, args.workers, ["--resize", str(RESIZE)])))
    return peaks


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.im2rec", description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs that are made")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["resize", "pass-through", "memory"], nargs="+")
    parser.add_argument("--folder", type=Path, help="keep the images here between runs; unset: a temporary folder")
    args = parser.parse_args()
    wanted = args.only or ["resize", "pass-through", "memory"]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="im2rec_"))
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / "images").exists():
            (folder / "size").write_text(str(make_images(folder / "images", args.images, args.quality)))
        kilobytes = float((folder / "size").read_text())
        for contender in ("ours", "mxnet"):
            write_list(folder / f"{contender}.lst", args.images)
        result: dict[str, object] = {"images": args.images, "kilobytes": kilobytes, "workers": args.workers}
        if "resize" in wanted:
            result["resize"] = measure_resize(folder, args)
        if "pass-through" in wanted:
            result["pass_through"] = measure_pass_through(folder, args, kilobytes)
        if "memory" in wanted:
            result["memory"] = measure_memory(folder, args)
        print(json.dumps(result, indent=1))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
