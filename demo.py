"""The main job in small: train, stop, continue, draw the curves; all on the embedded dataset.

`make demo` runs it. Everything lands in demo_run/, which is emptied first.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from errors import ProjectError, run_command

FOLDER = Path("demo_run")
PREFIX = FOLDER / "model" / "se-resnext-demo-20"
LOG_DIR = FOLDER / "log" / "se-resnext-demo-20"
STOP_AFTER = 5  # epochs of the first part


def run(*command: str) -> None:
    """Show a command as a user would type it, then run it; ProjectError when it fails."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    status = subprocess.call([sys.executable, *command])
    if status:
        raise ProjectError(f"`python {' '.join(command)}` ended with status {status}")


def train(*more: str) -> None:
    """One part of the training, with the demo's preset."""
    run(
        "train_se_resnext.py", "--data-type", "demo", "--model-prefix", str(PREFIX), "--log-dir", str(LOG_DIR), *more
    )  # fmt: skip


def main() -> int:
    """Train to epoch STOP_AFTER, continue to the end with --retrain, draw the curves and sum up."""
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    train("--epochs", str(STOP_AFTER))
    train("--model-load-epoch", str(STOP_AFTER), "--retrain")
    curves = FOLDER / "curves.png"
    log = LOG_DIR / "run.jsonl"
    run("plot_curves.py", str(log), "-o", str(curves))
    epochs = [line for line in map(json.loads, log.read_text().splitlines()) if line["type"] == "epoch"]
    final = epochs[-1]
    print(
        f"\nEpoch {final['epoch']}: validation top-1 {final['validation']['top1']:.2%}, "
        f"top-5 {final['validation']['top5']:.2%}, in {time.monotonic() - started:.0f} s.\n"
        f"  checkpoints  {PREFIX}-NNNN.params, .states, .json, and {PREFIX}-symbol.json\n"
        f"  log          {log} and {LOG_DIR / 'train.log'}\n"
        f"  curves       {curves}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
