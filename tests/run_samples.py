"""Made-up but plausible runs for the tests of logs, curves and comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_run(folder: Path, epochs: int, *, seed: int = 0, floor: float = 0.06, lr_steps=None, **arguments) -> Path:
    """Write a run.jsonl whose errors fall towards `floor`, with a drop at every rate step."""
    steps = [epochs // 2, 3 * epochs // 4] if lr_steps is None else lr_steps
    rng = np.random.default_rng([seed, epochs, int(1000 * floor)])
    flags = {
        "network": "se_resnext",
        "depth": 20,
        "lr": 0.1,
        "no_se": False,
        "seed": seed,
        "log_dir": str(folder),
        "model_prefix": str(folder / "model"),
        "model_load_prefix": str(folder / "model"),
        "model_load_epoch": 0,
    }
    records = [
        {
            "type": "header",
            "time": "2024-05-01T10:00:00+00:00",
            "arguments": {**flags, **arguments},
            "versions": {"numpy": "1.26.4"},
            "network": "se_resnext",
            "engine": "symbol",
            "parameters": 1_234_567,
            "multiply_adds": 98_765_432,
            "classes": 10,
            "train_images": 6000,
            "val_images": 1000,
            "steps_per_epoch": 60,
        }
    ]
    for epoch in range(1, epochs + 1):
        passed = sum(epoch > step for step in steps)
        error = floor + 0.55 * np.exp(-5 * epoch / epochs) + 0.05 * 0.4**passed * (1 + 0.3 * rng.standard_normal())
        error = float(np.clip(error, 0.01, 0.9))
        train_error = error * (1.25 - 0.6 * epoch / epochs)
        records.append(
            {
                "type": "epoch",
                "epoch": epoch,
                "update": 60 * epoch,
                "images": 6000 * epoch,
                "lr": 0.1 * 0.1**passed,
                "train": {"loss": 2.9 * train_error, "top1": 1 - train_error, "top5": 1 - train_error / 12},
                "validation": {"loss": 2.9 * error + 0.02, "top1": 1 - error, "top5": 1 - error / 12},
                "images_per_second": 400.0 + 5 * rng.standard_normal(),
                "data_wait": 0.02,
                "seconds": 15.0,
                "peak_memory": 400_000_000 + 1_000_000 * seed,
                "elapsed": 15.0 * epoch * (1 + 0.02 * seed),
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
