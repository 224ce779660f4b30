"""Augmentation: ranges, golden properties of every function, and the composition of the levels."""

from __future__ import annotations

import argparse
from functools import partial

import cv2
import numpy as np
import pytest

from errors import OptionError
from training import augment
from training.augment import Augmenter, train_augmenter, validation_augmenter
from training.augment_options import AugmentOptions, add_augment_args, augment_options


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int = 40, width: int = 60) -> np.ndarray:
    return rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(height: int, width: int) -> np.ndarray:
    """A picture whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)


STEPS = {
    "center_crop": partial(augment.center_crop, size=32),
    "padded_random_crop": partial(augment.padded_random_crop, size=32, pad=4),
    "random_affine_crop": partial(
        augment.random_affine_crop, size=32, min_scale=0.5, aspect=0.25, angle=10, shear=0.1, pad=2
    ),
    "random_mirror": augment.random_mirror,
    "hsl_jitter": partial(augment.hsl_jitter, hue=36, saturation=50, lightness=50),
    "brightness": partial(augment.brightness, bound=0.4),
    "contrast": partial(augment.contrast, bound=0.4),
    "saturation": partial(augment.saturation, bound=0.4),
    "pca_lighting": partial(augment.pca_lighting, std=0.1),
    "random_erasing": partial(augment.random_erasing, probability=1.0),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_pure_and_decided_by_the_generator(name):
    image = noise()
    before = image.copy()
    first, again, other = (STEPS[name](image, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)
    assert first.dtype == np.uint8
    assert first.shape == ((32, 32, 3) if "crop" in name else image.shape)
    assert name == "center_crop" or any((STEPS[name](image, rng(seed)) != first).any() for seed in range(2, 8))
    assert other.shape == first.shape


def test_random_crop_reaches_every_place_and_nothing_else():
    seen = {augment.random_crop_window(5, 4, generator, size=3)[:2] for generator in [rng(5)] for _ in range(300)}
    assert seen == {(top, left) for top in range(3) for left in range(2)}


def test_random_crop_of_a_small_picture_enlarges_the_largest_square():
    window = augment.random_crop_window(20, 30, rng(), size=32)
    assert window[2:] == (20, 20, 32, 32)
    assert augment.take_window(noise(20, 30), window).shape == (32, 32, 3)


def test_random_resized_window_keeps_its_ranges():
    generator, shares, ratios = rng(3), [], []
    for _ in range(500):
        window = augment.random_resized_window(300, 400, generator, size=64, area=(0.08, 0.6), aspect=(0.75, 4 / 3))
        assert 0 <= window.top <= 300 - window.height
        assert 0 <= window.left <= 400 - window.width
        shares.append(window.height * window.width / (300 * 400))
        ratios.append(window.width / window.height)
    assert 0.079 < min(shares) < 0.12
    assert 0.55 < max(shares) < 0.601
    assert 0.74 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.35
    assert abs(np.mean(np.log(ratios))) < 0.03


def test_random_resized_window_falls_back_to_the_centre():
    window = augment.random_resized_window(10, 100, rng(), size=8, area=(1, 1), aspect=(0.75, 4 / 3))
    assert window == (0, 43, 10, 13, 8, 8)


def test_take_window_resizes_as_opencv_does():
    image = noise()
    window = augment.Window(3, 5, 30, 20, 25, 25)
    expected = cv2.resize(image[3:33, 5:25], (25, 25), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(augment.take_window(image, window), expected)
    halved = augment.take_window(image, augment.Window(0, 0, 40, 60, 20, 30))
    means = image.reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - means).max() <= 0.5


def test_take_window_of_a_reduced_picture_shows_the_same_place():
    image = cv2.resize(noise(4, 4), (160, 160), interpolation=cv2.INTER_CUBIC)
    reduced = cv2.resize(image, (80, 80), interpolation=cv2.INTER_AREA)
    window = augment.Window(21, 33, 101, 99, 48, 48)
    difference = augment.take_window(image, window).astype(int) - augment.take_window(reduced, window, 2)
    assert np.abs(difference).mean() < 5
    for edge in (159, 160):
        last = augment.Window(edge - 51, edge - 51, 51, 51, 25, 25)
        assert augment.take_window(reduced, last, 2).shape == (25, 25, 3)


def test_center_crop_and_its_padding():
    crop = augment.center_crop(coordinates(41, 60), rng(), 32)
    assert crop[0, 0].tolist() == [4, 14, 0]
    padded = augment.center_crop(np.zeros((28, 28, 3), np.uint8), rng(), 32)
    assert (padded[2:30, 2:30] == 0).all()
    assert (padded[:2] == augment.FILL).all()
    assert (padded[:, 30:] == augment.FILL).all()


def test_padded_random_crop_reaches_the_padding_on_all_sides():
    image = np.zeros((32, 32, 3), np.uint8)
    generator = rng(1)
    crops = [augment.padded_random_crop(image, generator, 32, 4) for _ in range(60)]
    filled = [np.argwhere(crop[..., 0] == augment.FILL) for crop in crops]
    assert any((places == 0).any() for places in filled)
    assert any((places == 31).any() for places in filled)
    assert max((crop[16, :, 0] == augment.FILL).sum() for crop in crops) == 4


def test_affine_crop_without_ranges_is_a_random_crop():
    image = coordinates(40, 60)
    crop = augment.random_affine_crop(image, rng(4), 32)
    top, left = crop[0, 0, :2]
    np.testing.assert_array_equal(crop, image[top : top + 32, left : left + 32])


def test_affine_crop_scales_no_further_than_the_crop_needs():
    image = np.zeros((40, 40, 3), np.uint8)
    for seed in range(20):
        crop = augment.random_affine_crop(image, rng(seed), 36, min_scale=0.1)
        # A row or column may be mixed with the grey outside at the very edge.
        assert (crop[1:-1, 1:-1] == 0).all()


def test_affine_crop_rotates_about_the_middle_within_its_angle():
    image = np.zeros((65, 65, 3), np.uint8)
    image[32, 48:52] = 255
    angles = []
    for seed in range(200):
        rows, columns = np.nonzero(augment.random_affine_crop(image, rng(seed), 65, angle=10)[..., 0] > 60)
        inside = np.hypot(rows - 32, columns - 32) < 22
        angles.append(np.degrees(np.arctan2((rows[inside] - 32).mean(), (columns[inside] - 32).mean())))
    assert -11.5 < min(angles) < -7
    assert 7 < max(angles) < 11.5


def test_mirror_exchanges_left_and_right():
    image = noise()
    np.testing.assert_array_equal(augment.random_mirror(image, rng(), 1.0), image[:, ::-1])
    np.testing.assert_array_equal(augment.random_mirror(image, rng(), 0.0), image)
    generator = rng(2)
    mirrored = sum((augment.random_mirror(image, generator) != image).any() for _ in range(400))
    assert 160 < mirrored < 240


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "pca_lighting"])
def test_colour_steps_with_bound_zero_change_nothing(name):
    step, image = getattr(augment, name), noise()
    result = step(image, rng(), 0.0)
    np.testing.assert_array_equal(result, image)


def test_colour_steps_move_what_they_say():
    image = noise()
    grey = np.full((8, 8, 3), 100, np.uint8)
    for seed in range(5):
        values = augment.brightness(grey, rng(seed), 0.3)
        assert 70 <= values[0, 0, 0] <= 130
        np.testing.assert_array_equal(augment.contrast(grey, rng(seed), 0.9), grey)
        np.testing.assert_array_equal(augment.saturation(grey, rng(seed), 0.9), grey)
        mean = cv2.cvtColor(augment.contrast(image, rng(seed), 0.2), cv2.COLOR_RGB2GRAY).mean()
        assert abs(mean - cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()) < 2


def test_pca_lighting_shifts_every_pixel_alike():
    image = rng(1).integers(60, 190, (6, 6, 3), dtype=np.uint8)
    shift = augment.pca_lighting(image, rng(5), 0.1).astype(int) - image
    assert (shift == shift[0, 0]).all()
    assert shift.any()


def test_hsl_jitter_is_lossless_up_to_rounding_without_ranges():
    smooth = cv2.resize(noise(4, 4), (32, 32), interpolation=cv2.INTER_CUBIC)
    change = augment.hsl_jitter(smooth, rng(), 0, 0, 0).astype(int) - smooth
    assert np.abs(change).mean() < 2
    lighter = [augment.hsl_jitter(smooth, rng(seed), 0, 0, 50).mean() - smooth.mean() for seed in range(30)]
    assert -53 < min(lighter) < -20
    assert 20 < max(lighter) < 53


def test_random_erasing_keeps_its_area():
    image = np.zeros((64, 64, 3), np.uint8)
    shares = [(augment.random_erasing(image, rng(seed), 1.0) > 0).any(axis=2).mean() for seed in range(100)]
    assert 0.01 < min(shares) < 0.08
    assert 0.3 < max(shares) <= 0.42
    assert augment.random_erasing(image, rng(), 0.0) is image


@pytest.mark.parametrize("level", augment.LEVELS)
@pytest.mark.parametrize("shape", [(256, 256), (300, 480), (97, 50), (16, 16)])
@pytest.mark.parametrize("more", [{}, {"min_random_area": 0.08}, {"pad": 4}], ids=["crop", "resized", "pad"])
def test_every_level_gives_the_size_for_any_picture(level, shape, more):
    if level == 0:
        more = {}
    train = train_augmenter(AugmentOptions(image_size=64, aug_level=level, **more))
    assert train(noise(*shape), rng()).shape == (64, 64, 3)


def test_levels_are_the_originals():
    assert augment.LEVELS[2]._asdict() == {
        "random_crop": True, "mirror": 0.5, "min_scale": 0.533, "aspect": 0.25, "hue": 36, "saturation": 50,
        "lightness": 50, "angle": 0.0, "shear": 0.0,
    }  # fmt: skip
    assert augment.LEVELS[3] == augment.LEVELS[2]._replace(angle=10.0, shear=0.1)
    assert augment.LEVELS[1] == augment.Level(random_crop=True, mirror=0.5)


def test_level_zero_and_validation_are_the_centre():
    options = AugmentOptions(image_size=28, aug_level=0)
    image = noise(28, 28)
    for augmenter in (train_augmenter(options), validation_augmenter(AugmentOptions(image_size=28, pad=2))):
        np.testing.assert_array_equal(augmenter(image, rng()), image)


def test_validation_resizes_the_short_edge_then_crops_the_centre():
    image = noise(300, 500)
    expected = cv2.resize(image, (427, 256), interpolation=cv2.INTER_LINEAR)[16:240, 101:325]
    np.testing.assert_array_equal(validation_augmenter(AugmentOptions())(image, rng()), expected)
    exact = validation_augmenter(AugmentOptions(image_size=96, val_resize=100))(noise(100, 100), rng())
    np.testing.assert_array_equal(exact, noise(100, 100)[2:98, 2:98])


def test_all_colour_options_take_part():
    options = AugmentOptions(
        image_size=32, brightness=0.4, contrast=0.4, saturation=0.4, pca_noise=0.1, random_erasing=0.5
    )
    functions = [step.func.__name__ for step in train_augmenter(options).steps]
    assert functions == ["color_jitter", "pca_lighting", "random_mirror", "random_erasing"]
    orders = {tuple(rng(seed).permutation(3)) for seed in range(50)}
    assert len(orders) == 6
    assert isinstance(train_augmenter(options), Augmenter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aug_level": 4}, "there are 0, 1, 2, 3"),
        ({"pad": -1}, "--pad"),
        ({"pad": 4, "min_random_area": 0.1}, "--pad 0"),
        ({"min_random_area": 0.0}, "--min-random-area"),
        ({"min_random_area": 0.5, "max_random_area": 0.4}, "--max-random-area"),
        ({"min_aspect_ratio": 0.5}, "need --min-random-area"),
        ({"min_random_area": 0.5, "min_aspect_ratio": 2.0}, "--max-aspect-ratio"),
        ({"brightness": 1.5}, "--brightness"),
        ({"aug_level": 0, "contrast": 0.2}, "--contrast"),
        ({"val_resize": 100}, "--val-resize"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        AugmentOptions(**options)


def test_flags_give_the_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--image-size", type=int, default=224)
    add_augment_args(parser.add_argument_group("augmentation"))
    assert augment_options(parser.parse_args([])) == AugmentOptions()
    flags = (
        "--image-size 96 --aug-level 3 --min-random-area 0.08 --min-aspect-ratio 0.7 --pca-noise 0.1 --val-resize 99"
    )
    expected = AugmentOptions(
        image_size=96, aug_level=3, min_random_area=0.08, min_aspect_ratio=0.7, pca_noise=0.1, val_resize=99
    )
    assert augment_options(parser.parse_args(flags.split())) == expected
