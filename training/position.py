"""Where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from engines.base import Metrics


@dataclass
class Position:
    """Where a run stands; together with the engine's state all that is needed to continue it.

    epoch: epochs completed. batch: batches done in the running epoch. images: images seen in all. epoch_sums and
    window_sums: metrics of the running epoch up to the last train line, and since that line. best: epoch and
    validation top-1 of the best epoch so far (training top-1 where there is no validation).
    """

    epoch: int = 0
    batch: int = 0
    images: int = 0
    epoch_sums: Metrics = field(default_factory=Metrics)
    window_sums: Metrics = field(default_factory=Metrics)
    best: dict | None = None

    def as_dict(self) -> dict:
        """The position in JSON's types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Position:
        """The position that `as_dict` described."""
        sums = {name: Metrics(**values[name]) for name in ("epoch_sums", "window_sums")}
        return cls(**{**values, **sums})
