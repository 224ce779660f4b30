"""What is to be done to the images of a pack, as options; apart from the code that needs the image libraries."""

from __future__ import annotations

from dataclasses import dataclass

from errors import UsageError

JPEG, PNG = ".jpg", ".png"
GREY, RGB, AS_IS = 0, 1, -1
DECODE, MARKERS = "decode", "markers"
DEFAULT_QUALITY = {JPEG: 95, PNG: 9}


@dataclass(frozen=True)
class Conversion:
    """What is done to the images of a pack.

    resize: pixels of the short edge, 0 for none. center_crop: cut out the middle square first. quality: 1-100
    for JPEG, 1-9 for PNG. encoding: ".jpg" or ".png". color: RGB, GREY or AS_IS (with alpha and 16 bits where
    the encoding holds them). pass_through: no image is changed; each is only checked. check: how, DECODE or MARKERS.
    yuv_planes: JPEGs are resized as the planes that they store, not as RGB, where both files have chroma at half
    resolution (4:2:0).
    """

    resize: int = 0
    center_crop: bool = False
    quality: int = DEFAULT_QUALITY[JPEG]
    encoding: str = JPEG
    color: int = RGB
    pass_through: bool = False
    check: str = DECODE
    yuv_planes: bool = False

    def __post_init__(self) -> None:
        best = 100 if self.encoding == JPEG else 9
        if not 1 <= self.quality <= best:
            raise UsageError(f"--quality {self.quality}: {self.encoding} takes 1 to {best}")
        if self.resize < 0:
            raise UsageError(f"--resize {self.resize}: the short edge cannot be negative")
        if self.pass_through and (self.resize or self.center_crop):
            raise UsageError("--pass-through changes no image: leave out --resize and --center-crop")
        if self.yuv_planes and (self.pass_through or self.encoding != JPEG or self.color == GREY):
            raise UsageError("--yuv-planes makes colour JPEGs: leave out --pass-through, --encoding and --color")
