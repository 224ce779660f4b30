"""Augmentation: small pure functions on (image, random generator), composed as `augment_options` says.

Images are uint8 (H, W, 3), RGB. A function never writes into the image it was given and takes everything random from
`rng`, so the same generator state gives the same pixels.

An `Augmenter` begins with a window: which part of the picture is used, and the size it gets. It depends on the
picture's size alone, so that the loader can draw it before decoding and decode no finer than needed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Callable, NamedTuple

import cv2
import numpy as np

from training.augment_options import LEVELS, MIRROR_PROBABILITY, WHOLE_BELOW, AugmentOptions, Level

Step = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Grey of what lies outside the picture after padding, rotating or shrinking; the original's `fill_value`.
FILL = 127
# Principal components of the colours of ImageNet's pixels, 0 to 255, RGB (Krizhevsky et al. 2012, section 4.1).
PCA_STD = np.array([55.46, 4.794, 1.148])
PCA_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
# Zhong et al. 2017, "Random Erasing": part of the picture's area, and height over width.
ERASED_AREA = (0.02, 0.4)
ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10


class Window(NamedTuple):
    """A part of a picture and the size it is resized to, in pixels."""

    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _offset(rng: np.random.Generator, count: int) -> int:
    """A whole number from 0 to `count`, both included."""
    return int(rng.random() * (count + 1))


# ------------------------------------------------------------------------------------------------------- windows


def whole_window(height: int, width: int, rng: np.random.Generator) -> Window:
    """The picture as it is."""
    return Window(0, 0, height, width, height, width)


def short_edge_window(height: int, width: int, rng: np.random.Generator, size: int) -> Window:
    """The whole picture, resized so that its shorter edge has `size` pixels; draws nothing."""
    short = min(height, width)
    return Window(0, 0, height, width, round(height * size / short), round(width * size / short))


def random_crop_window(height: int, width: int, rng: np.random.Generator, size: int) -> Window:
    """A square of `size` pixels anywhere in the picture; the largest square, enlarged, where the picture is smaller."""
    side = min(height, width, size)
    return Window(_offset(rng, height - side), _offset(rng, width - side), side, side, size, size)


def random_resized_window(
    height: int,
    width: int,
    rng: np.random.Generator,
    size: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Window:
    """A part of the picture, resized to `size` x `size` (Szegedy et al. 2015, section 6).

    area: share of the picture's area, 0 < low <= high <= 1, uniform. aspect: width over height, uniform in its
    logarithm. Where no such part fits in ten attempts, the largest centred one that keeps to `aspect` is taken.
    """
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_ATTEMPTS):
        pixels = _between(rng, *area) * height * width
        ratio = math.exp(_between(rng, *log_aspect))
        part_width, part_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            top, left = _offset(rng, height - part_height), _offset(rng, width - part_width)
            return Window(top, left, part_height, part_width, size, size)
    part_width = min(width, max(1, round(height * aspect[1])))
    part_height = min(height, max(1, round(width / aspect[0])))
    return Window((height - part_height) // 2, (width - part_width) // 2, part_height, part_width, size, size)


def take_window(image: np.ndarray, window: Window, reduced: int = 1) -> np.ndarray:
    """The window's part of the picture at the window's size (a view where nothing is resized).

    reduced: `image` was decoded at this fraction (1, 2, 4, 8) of the size that the window speaks of. Bilinear; area
    means where both directions shrink to half or less.
    """
    top, left, height, width, out_height, out_width = window
    if reduced > 1:
        top, left = top // reduced, left // reduced
        height = min(max(1, round(height / reduced)), image.shape[0] - top)
        width = min(max(1, round(width / reduced)), image.shape[1] - left)
    part = image[top : top + height, left : left + width]
    if (height, width) == (out_height, out_width):
        return part
    halved = height >= 2 * out_height and width >= 2 * out_width
    return cv2.resize(part, (out_width, out_height), interpolation=cv2.INTER_AREA if halved else cv2.INTER_LINEAR)


# ------------------------------------------------------------------------------------------------ steps: geometry


def center_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """The square of `size` pixels in the middle, filled up with grey where the picture is smaller; draws nothing."""
    height, width = image.shape[:2]
    if height < size or width < size:
        image = _pad_to(image, size)
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _pad_to(image: np.ndarray, size: int) -> np.ndarray:
    missing = [max(0, size - edge) for edge in image.shape[:2]]
    top, left = missing[0] // 2, missing[1] // 2
    return cv2.copyMakeBorder(
        image, top, missing[0] - top, left, missing[1] - left, cv2.BORDER_CONSTANT, value=(FILL,) * 3
    )


def padded_random_crop(image: np.ndarray, rng: np.random.Generator, size: int, pad: int) -> np.ndarray:
    """A square of `size` pixels anywhere in the picture with `pad` >= 0 pixels of grey around it."""
    image = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(FILL,) * 3)
    if min(image.shape[:2]) < size:
        image = _pad_to(image, size)
    top, left = _offset(rng, image.shape[0] - size), _offset(rng, image.shape[1] - size)
    return image[top : top + size, left : left + size]


def random_affine_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    min_scale: float = 1.0,
    aspect: float = 0.0,
    angle: float = 0.0,
    shear: float = 0.0,
    pad: int = 0,
) -> np.ndarray:
    """Scale, squeeze, rotate and shear about the middle, then a random crop of `size`, as ImageRecordIter does it.

    Uniform draws: scale in [min_scale, 1] (raised where the scaled picture with `pad` pixels around it would be
    smaller than `size`), width over height in 1 +- aspect, rotation in +-angle degrees, shear in +-shear. One
    bilinear warp; grey outside the picture.
    """
    height, width = image.shape[:2]
    low = max(min_scale, (size - 2 * pad) / min(height, width))
    scale = _between(rng, low, max(1.0, low))
    ratio = 1 + _between(rng, -aspect, aspect)
    tilt = _between(rng, -shear, shear)
    turn = math.radians(_between(rng, -angle, angle))
    across, down = 2 * scale * ratio / (1 + ratio), 2 * scale / (1 + ratio)
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = np.array([[across * cos - tilt * sin * down, across * sin + tilt * cos * down], [-sin * down, cos * down]])
    # Middle of the picture to the middle of the scaled canvas, then to where the crop sees it.
    canvas = np.array([round(scale * width), round(scale * height)])
    room = np.maximum(canvas + 2 * pad - size, 0)
    corner = np.array([_offset(rng, room[0]), _offset(rng, room[1])]) - pad
    shift = canvas / 2 - matrix @ (width / 2, height / 2) - corner
    return cv2.warpAffine(
        image,
        np.column_stack([matrix, shift]),
        (size, size),
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL,) * 3,
    )


def random_mirror(image: np.ndarray, rng: np.random.Generator, probability: float = MIRROR_PROBABILITY) -> np.ndarray:
    """Left and right exchanged with the given probability."""
    return cv2.flip(image, 1) if rng.random() < probability else image


# -------------------------------------------------------------------------------------------------- steps: colour


def _lookup(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Every value v of channel c replaced by values[v, c] (256, 3) or values[v] (256,), rounded and clipped."""
    table = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table.reshape(1, 256, -1) if table.ndim == 2 else table)


_VALUES = np.arange(256.0)


def hsl_jitter(image: np.ndarray, rng: np.random.Generator, hue: int, saturation: int, lightness: int) -> np.ndarray:
    """Add uniform draws from +-hue (of 180), +-saturation and +-lightness (of 255) in the HLS space.

    Clipped at both ends as in ImageRecordIter: the hue too, though it is a circle.
    """
    added = [_between(rng, -bound, bound) for bound in (hue, lightness, saturation)]
    shifted = np.clip(_VALUES[:, None] + added, 0, (180, 255, 255))
    return cv2.cvtColor(_lookup(cv2.cvtColor(image, cv2.COLOR_RGB2HLS), shifted), cv2.COLOR_HLS2RGB)


def brightness(image: np.ndarray, rng: np.random.Generator, bound: float) -> np.ndarray:
    """Multiply by a draw from 1 +- bound, 0 <= bound <= 1."""
    return _lookup(image, _VALUES * _between(rng, 1 - bound, 1 + bound))


def contrast(image: np.ndarray, rng: np.random.Generator, bound: float) -> np.ndarray:
    """Stretch around the picture's mean luma by a draw from 1 +- bound, 0 <= bound <= 1."""
    factor = _between(rng, 1 - bound, 1 + bound)
    middle = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return _lookup(image, middle + (_VALUES - middle) * factor)


def saturation(image: np.ndarray, rng: np.random.Generator, bound: float) -> np.ndarray:
    """Move away from (or to) the picture's own luma by a draw from 1 +- bound, 0 <= bound <= 1."""
    factor = _between(rng, 1 - bound, 1 + bound)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def color_jitter(image: np.ndarray, rng: np.random.Generator, jitters: tuple[Step, ...]) -> np.ndarray:
    """Apply `jitters` in random order."""
    for place in rng.permutation(len(jitters)):
        image = jitters[place](image, rng)
    return image


def pca_lighting(image: np.ndarray, rng: np.random.Generator, std: float) -> np.ndarray:
    """Add a colour along ImageNet's principal components, each by a normal draw with `std` >= 0 (0.1 is usual)."""
    return _lookup(image, _VALUES[:, None] + PCA_DIRECTIONS @ (rng.normal(0, std, 3) * PCA_STD))


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    area: tuple[float, float] = ERASED_AREA,
    aspect: tuple[float, float] = ERASED_ASPECT,
) -> np.ndarray:
    """With the given probability replace a rectangle by random pixels (Zhong et al. 2017).

    area: its share of the picture's, aspect: its height over its width (uniform in the logarithm). A rectangle that
    does not fit is drawn again, ten times at most.
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(_ATTEMPTS):
        pixels = _between(rng, *area) * height * width
        ratio = math.exp(_between(rng, math.log(aspect[0]), math.log(aspect[1])))
        erased = max(1, round(math.sqrt(pixels * ratio))), max(1, round(math.sqrt(pixels / ratio)))
        if erased[0] < height and erased[1] < width:
            top, left = _offset(rng, height - erased[0]), _offset(rng, width - erased[1])
            image = image.copy()
            noise = rng.integers(0, 256, (*erased, 3), dtype=np.uint8)
            image[top : top + erased[0], left : left + erased[1]] = noise
            return image
    return image


# ---------------------------------------------------------------------------------------------------- composition


class Augmenter:
    """A window and the steps after it; called with (image, rng) it returns the augmented image.

    Loaders that want to know the window before they decode use `window` and `finish` instead: window(height, width,
    rng) draws it, finish(image, window, rng, reduced) takes it and applies the steps.
    """

    def __init__(self, window: Callable[[int, int, np.random.Generator], Window], steps: tuple[Step, ...] = ()) -> None:
        self.window, self.steps = window, steps

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.finish(image, self.window(image.shape[0], image.shape[1], rng), rng)

    def finish(self, image: np.ndarray, window: Window, rng: np.random.Generator, reduced: int = 1) -> np.ndarray:
        """Apply window and steps to a picture that was decoded at 1/`reduced` of its size."""
        image = take_window(image, window, reduced)
        for step in self.steps:
            image = step(image, rng)
        return image


def train_augmenter(options: AugmentOptions) -> Augmenter:
    """The augmentation of training images; their size is `options.image_size` squared."""
    level = LEVELS[options.aug_level]
    if not level.random_crop:
        return validation_augmenter(options)
    window, steps = _geometry(options, level)
    jitters = [
        (brightness, options.brightness),
        (contrast, options.contrast),
        (saturation, options.saturation),
    ]
    jitters = tuple(partial(function, bound=bound) for function, bound in jitters if bound)
    if jitters:
        steps.append(partial(color_jitter, jitters=jitters))
    if level.hue or level.saturation or level.lightness:
        steps.append(partial(hsl_jitter, hue=level.hue, saturation=level.saturation, lightness=level.lightness))
    if options.pca_noise:
        steps.append(partial(pca_lighting, std=options.pca_noise))
    steps.append(partial(random_mirror, probability=level.mirror))
    if options.random_erasing:
        steps.append(partial(random_erasing, probability=options.random_erasing))
    return Augmenter(window, tuple(steps))


def _geometry(options: AugmentOptions, level: Level) -> tuple[Callable, list[Step]]:
    """Window and first steps: where the pixels of the training image come from."""
    size, pad = options.image_size, options.pad
    window = partial(random_crop_window, size=size)
    scale, aspect = level.min_scale, level.aspect
    if options.random_resized:
        areas = (options.min_random_area, options.max_random_area)
        aspects = (options.min_aspect_ratio, options.max_aspect_ratio)
        window = partial(random_resized_window, size=size, area=areas, aspect=aspects)
        # The window takes the part of scale and aspect ratio; rotation and shear, if any, act on what it shows.
        scale, aspect = 1.0, 0.0
    if scale < 1 or aspect or level.angle or level.shear:
        affine = partial(
            random_affine_crop,
            size=size,
            min_scale=scale,
            aspect=aspect,
            angle=level.angle,
            shear=level.shear,
            pad=pad,
        )
        return window if options.random_resized else whole_window, [affine]
    if pad:
        return whole_window, [partial(padded_random_crop, size=size, pad=pad)]
    return window, []


def validation_augmenter(options: AugmentOptions) -> Augmenter:
    """Short edge resized to `val_resize`, then the middle `image_size` squared; nothing random."""
    size = options.image_size
    resize = options.val_resize or (size if size < WHOLE_BELOW else round(size * 256 / 224))
    return Augmenter(partial(short_edge_window, size=resize), (partial(center_crop, size=size),))
