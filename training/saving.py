"""What a run saves and when old checkpoints go: the policy on top of training.checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from engines.base import TrainState
from training.checkpoint import (
    EXTENSIONS,
    iter_checkpoints,
    prune,
    save_best,
    save_checkpoint,
)
from training.position import Position
from training.schedule import Schedule


def remove_checkpoints(prefix: str) -> None:
    """Delete every checkpoint that a run of ours left under `prefix`; files without our manifest stay."""
    for entry in list(iter_checkpoints(prefix, hashes=False)):
        if entry.manifest:
            for extension in EXTENSIONS:
                Path(f"{entry.stem}.{extension}").unlink(missing_ok=True)


class Saver:
    """Writes the checkpoints of one run under `prefix`; CheckpointError when one cannot be written.

    manifest: what every checkpoint says of the run (arguments, network, versions, seeds...). keep: checkpoints kept
    beside the best one, 0 for all. continued_from: the checkpoint that the run goes on from, never deleted.
    """

    def __init__(
        self,
        prefix: str,
        symbol_json: str,
        manifest: dict,
        schedule: Schedule,
        *,
        keep: int = 0,
        continued_from: Path | None = None,
    ):
        self.prefix = prefix
        self.symbol_json = symbol_json
        self.manifest = {**manifest, "schedule": asdict(schedule)}
        self.keep = keep or None
        self.protect = [continued_from] if continued_from else []

    def save(self, position: Position, state: TrainState, metrics: dict | None = None, best: bool = False) -> None:
        """Save at `position`, at the end of an epoch or inside it; also as `<prefix>-best` when it is the best."""
        path = save_checkpoint(
            self.prefix, position.epoch, state, batch=position.batch, symbol_json=self.symbol_json,
            manifest={**self.manifest, "position": position.as_dict(), "metrics": metrics},
        )  # fmt: skip
        # Old ones go first: the copy of the best may need their room.
        prune(self.prefix, self.keep, [*self.protect, path])
        if best:
            save_best(path)
