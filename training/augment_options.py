"""The choices in augmentation: the table of levels, the options and their flags; apart from the code that needs OpenCV.

The numbers of the levels are those that the original SENet.mxnet gave to MXNet's ImageRecordIter.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import NamedTuple

from errors import OptionError

MIRROR_PROBABILITY = 0.5
# The usual share of a validation picture: 224 of 256 pixels; pictures below this size are taken whole.
WHOLE_BELOW = 64


class Level(NamedTuple):
    """A row of the table of levels; every number is a bound of a uniform draw."""

    random_crop: bool = False
    mirror: float = 0.0  # probability
    min_scale: float = 1.0  # scale between this and 1
    aspect: float = 0.0  # width over height between 1 - aspect and 1 + aspect
    hue: int = 0  # +-, of OpenCV's 180 steps around the circle
    saturation: int = 0  # +-, of 255
    lightness: int = 0  # +-, of 255
    angle: float = 0.0  # +- degrees
    shear: float = 0.0  # +- ratio


_CROP_AND_MIRROR = Level(random_crop=True, mirror=MIRROR_PROBABILITY)
_JITTER = _CROP_AND_MIRROR._replace(min_scale=0.533, aspect=0.25, hue=36, saturation=50, lightness=50)
LEVELS = {0: Level(), 1: _CROP_AND_MIRROR, 2: _JITTER, 3: _JITTER._replace(angle=10.0, shear=0.1)}


@dataclass(frozen=True)
class AugmentOptions:
    """What the flags of `add_augment_args` say; OptionError where they contradict each other."""

    image_size: int = 224
    aug_level: int = 1
    pad: int = 0
    min_random_area: float = 1.0
    max_random_area: float = 1.0
    min_aspect_ratio: float = 3 / 4
    max_aspect_ratio: float = 4 / 3
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    pca_noise: float = 0.0
    random_erasing: float = 0.0
    val_resize: int = 0

    @property
    def random_resized(self) -> bool:
        """Whether a random part of the picture is resized, instead of a random crop."""
        return self.min_random_area < 1

    def __post_init__(self) -> None:
        if self.aug_level not in LEVELS:
            raise OptionError(f"--aug-level {self.aug_level} does not exist; there are {', '.join(map(str, LEVELS))}")
        for name in ("brightness", "contrast", "saturation", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{flag(name)} {getattr(self, name)} must be between 0 and 1")
        for name in ("pad", "pca_noise", "val_resize"):
            if getattr(self, name) < 0:
                raise OptionError(f"{flag(name)} {getattr(self, name)} must not be negative")
        if not 0 < self.min_random_area <= self.max_random_area <= 1:
            raise OptionError("--min-random-area and --max-random-area must be above 0, in order, and at most 1")
        if not 0 < self.min_aspect_ratio <= self.max_aspect_ratio:
            raise OptionError("--min-aspect-ratio and --max-aspect-ratio must be above 0 and in order")
        if 0 < self.val_resize < self.image_size:
            raise OptionError(f"--val-resize {self.val_resize} is smaller than the image size ({self.image_size})")
        self._check_meaning()

    def _check_meaning(self) -> None:
        """Refuse options that would silently do nothing."""
        given = {item.name for item in fields(self) if getattr(self, item.name) != item.default}
        if not self.random_resized and given & {"min_aspect_ratio", "max_aspect_ratio"}:
            raise OptionError("--min-aspect-ratio and --max-aspect-ratio need --min-random-area below 1")
        if self.random_resized and self.pad:
            raise OptionError(f"--pad {self.pad} does nothing with --min-random-area; add --pad 0")
        random_only = {
            "pad",
            "min_random_area",
            "brightness",
            "contrast",
            "saturation",
            "pca_noise",
            "random_erasing",
        }
        if self.aug_level == 0 and given & random_only:
            names = ", ".join(flag(name) for name in sorted(given & random_only))
            raise OptionError(
                f"--aug-level 0 means no augmentation, but {names} is given; raise the level or leave it out"
            )


def flag(name: str) -> str:
    """Name of the flag that sets an option."""
    return "--" + name.replace("_", "-")


def add_augment_args(group: argparse._ActionsContainer) -> None:
    """Add the augmentation flags to a parser or one of its groups; `augment_options` reads them."""
    default = AugmentOptions()

    def add(name: str, kind: type, metavar: str, text: str) -> None:
        group.add_argument(flag(name), type=kind, default=getattr(default, name), metavar=metavar, help=text)

    levels = (
        "0: centre crop; 1: random crop and mirror; 2: scale, aspect ratio and HSL jitter too; 3: rotation and shear"
    )
    add("aug_level", int, "0-3", levels + " too")
    add("pad", int, "PIXELS", "grey around the picture before the random crop")
    add(
        "min_random_area",
        float,
        "SHARE",
        "below 1: resize a random part with this share of the area, or more",
    )
    add("max_random_area", float, "SHARE", "largest share of the area of such a part")
    add("min_aspect_ratio", float, "RATIO", "smallest width over height of such a part")
    add("max_aspect_ratio", float, "RATIO", "largest width over height of such a part")
    add("brightness", float, "BOUND", "multiply by 1 +- BOUND")
    add("contrast", float, "BOUND", "stretch around the mean by 1 +- BOUND")
    add("saturation", float, "BOUND", "change saturation by 1 +- BOUND")
    add("pca_noise", float, "STD", "colour noise along ImageNet's principal components; 0.1 is usual")
    add("random_erasing", float, "PROBABILITY", "replace a random rectangle by noise with this probability")
    whole = f"0: 256/224 of --image-size from {WHOLE_BELOW} pixels up, --image-size below"
    add("val_resize", int, "PIXELS", f"short edge of validation images before the centre crop; {whole}")


def augment_options(args: argparse.Namespace) -> AugmentOptions:
    """Options from parsed flags (and `args.image_size`)."""
    return AugmentOptions(**{item.name: getattr(args, item.name) for item in fields(AugmentOptions)})
