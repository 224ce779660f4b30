"""How other projects name and build the residual networks whose weights they publish.

Sources: GluonCV 0.10.5 model_zoo/resnext.py; timm models/resnet.py; Cadene's pretrained-models.pytorch
models/senet.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from errors import UsageError

UNIT = re.compile(r"stage(?P<stage>\d+)_unit(?P<unit>\d+)_(?P<part>.+)")
ROLES = ("weight", "bias", "gamma", "beta", "moving_mean", "moving_var")
TORCH_LEAVES = {
    "weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
    "moving_mean": "running_mean", "moving_var": "running_var",
}  # fmt: skip
GLUON_LEAVES = {role: role.replace("moving", "running") for role in ROLES}


@dataclass(frozen=True)
class Layout:
    """Names and silent facts of a family of published weights.

    marker: a name that only this layout has. stem and parts: our node -> theirs, outside and inside a unit. unit:
    their name of a unit from its stage (1...) and its index (0...). leaves: our role of an array -> theirs. pool: how
    the stem pools. deep_stem, averaged: patterns of names that only variants have which our graphs do not declare.
    """

    title: str
    marker: str
    stem: Mapping[str, str]
    unit: str
    parts: Mapping[str, str]
    leaves: Mapping[str, str]
    deep_stem: str
    averaged: str
    pool: tuple = ((3, 3), (2, 2), (1, 1), "valid")
    stage_offset: int = 0
    strides_first: bool = False  # ungrouped bottlenecks stride in their first convolution
    eps: float = 1e-5

    def source_name(self, target: str) -> str | None:
        """Their name of our parameter; None for one that they do not have."""
        role = next((role for role in ROLES if target.endswith(f"_{role}")), None)
        if role is None:
            return None
        node = target[: -len(role) - 1]
        match = UNIT.fullmatch(node)
        if match is None:
            their_node = self.stem.get(node)
        else:
            part = self.parts.get(match["part"])
            unit = self.unit.format(stage=int(match["stage"]) + self.stage_offset, index=int(match["unit"]) - 1)
            their_node = part and f"{unit}.{part}"
        return their_node and f"{their_node}.{self.leaves[role]}"


_TORCH_PARTS = {
    "conv1": "conv1", "bn1": "bn1", "conv2": "conv2", "bn2": "bn2", "conv3": "conv3", "bn3": "bn3",
    "sc": "downsample.0", "sc_bn": "downsample.1",
}  # fmt: skip

LAYOUTS = (
    Layout(
        title="GluonCV's SE-ResNeXt",
        marker="features.1.running_mean",
        stem={"conv0": "features.0", "bn0": "features.1", "fc1": "output"},
        unit="features.{stage}.{index}",
        stage_offset=3,
        parts={
            "conv1": "body.0", "bn1": "body.1", "conv2": "body.3", "bn2": "body.4", "conv3": "body.6", "bn3": "body.7",
            "excitation1": "se.0", "excitation2": "se.2", "sc": "downsample.0", "sc_bn": "downsample.1",
        },
        leaves=GLUON_LEAVES,
        deep_stem=r"features\.6\.weight",
        averaged=r".*downsample\.2\.running_mean",
    ),
    Layout(
        title="Cadene's SENet",
        marker="layer0.bn1.running_mean",
        stem={"conv0": "layer0.conv1", "bn0": "layer0.bn1", "fc1": "last_linear"},
        unit="layer{stage}.{index}",
        parts={**_TORCH_PARTS, "excitation1": "se_module.fc1", "excitation2": "se_module.fc2"},
        leaves=TORCH_LEAVES,
        deep_stem=r"layer0\.conv2\.weight",
        averaged=r".*downsample\.2\.running_mean",
        pool=((3, 3), (2, 2), (0, 0), "full"),
        strides_first=True,
    ),
    Layout(
        title="timm's ResNet",
        marker="bn1.running_mean",
        stem={"conv0": "conv1", "bn0": "bn1", "fc1": "fc"},
        unit="layer{stage}.{index}",
        parts={**_TORCH_PARTS, "excitation1": "se.fc1", "excitation2": "se.fc2"},
        leaves=TORCH_LEAVES,
        deep_stem=r"conv1\.0\.weight",
        averaged=r".*downsample\.2\.running_mean",
    ),
)  # fmt: skip


def find_layout(names: Mapping[str, object]) -> Layout:
    """The layout of weights with these names; UsageError for none that is known."""
    for layout in LAYOUTS:
        if layout.marker in names:
            return layout
    titles = ", ".join(layout.title for layout in LAYOUTS)
    raise UsageError(f"the weights are in no known layout ({titles}); their first name is {next(iter(names), None)!r}")
