"""What tests/test_torch_processes.py runs under torchrun: trains a graph on this process's part of given batches.

    torchrun --nproc-per-node 2 tests/torch_worker.py FOLDER

FOLDER holds net.json, options.json (lr and options of the engine), first.npz (parameters) and batches.npz (images,
labels, and how many rows of each batch are padding); rank 0 leaves last.npz with parameters and momentum.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines.base import Batch, TrainState
from engines.torch_engine import TorchEngine
from engines.torch_group import TorchGroup


def main(folder: Path) -> None:
    batches = np.load(folder / "batches.npz")
    images, labels, options = batches["images"], batches["labels"], json.loads((folder / "options.json").read_text())
    lr = options.pop("lr")
    with TorchGroup("cpu") as group:
        rows = images.shape[1] // group.size
        engine = TorchEngine(
            (folder / "net.json").read_text(), image_shape=images.shape[2:], batch_size=rows, group=group, **options
        )
        engine.set_state(TrainState(dict(np.load(folder / "first.npz"))))
        for one_images, one_labels, pad in zip(images, labels, batches["pads"]):
            valid = len(one_labels) - int(pad)
            part = np.array_split(np.arange(valid), group.size)[group.rank]
            mine = np.resize(part, rows)
            engine.train_batch(Batch(one_images[mine], one_labels[mine], rows - len(part)), lr, valid)
        state = engine.get_state()
        if group.leads:
            np.savez(folder / "last.npz", **state.params, **state.optimizer)
        group.final_status(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
