"""Decoding: the same pixels as OpenCV, upright, and complete or refused."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from image_files import encoded as by_pillow
from PIL import Image, ImageOps

from data_prep.decode import DecodeError, decode_image, exif_orientation, image_size, reduction


def picture(height: int = 50, width: int = 70) -> np.ndarray:
    """Smooth colours, RGB, so that lossy formats stay close to it."""
    noise = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(kind: str, image: np.ndarray | None = None) -> bytes:
    image = picture() if image is None else image
    return cv2.imencode(kind, image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG with an EXIF segment that holds the one tag."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("sampling", ["444", "422", "420"])
def test_jpeg_pixels_are_those_of_opencv(sampling):
    data = simplejpeg.encode_jpeg(picture(), quality=90, colorsubsampling=sampling)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decode_image(memoryview(data)), expected)


@pytest.mark.parametrize("kind", [".png", ".bmp", ".tiff"])
def test_lossless_formats(kind):
    np.testing.assert_array_equal(decode_image(encoded(kind)), picture())


def test_grey_becomes_three_channels():
    grey = picture()[..., 0]
    for data in (encoded(".png", grey), encoded(".png", grey.astype(np.uint16) * 257)):
        np.testing.assert_array_equal(decode_image(data), np.repeat(grey[..., None], 3, axis=2))
    jpeg = decode_image(encoded(".jpg", grey))
    assert jpeg.shape == (50, 70, 3)
    assert (jpeg == jpeg[..., :1]).all()


def test_cmyk_jpeg_becomes_rgb():
    ink = np.zeros((32, 48, 4), np.uint8)
    ink[..., 1:] = 255  # stored inverted, as Adobe's programs do: no magenta, yellow and black
    data = simplejpeg.encode_jpeg(ink, quality=95, colorspace="CMYK", colorsubsampling="444")
    assert image_size(data) is None
    image = decode_image(data)
    assert image.shape == (32, 48, 3)
    assert np.abs(image.reshape(-1, 3).mean(0) - (0, 255, 255)).max() < 10


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied(orientation):
    data = with_orientation(encoded(".jpg"), orientation)
    assert exif_orientation(data) == orientation
    upright = np.rot90(decode_image(encoded(".jpg")), {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    np.testing.assert_array_equal(decode_image(data), upright)
    assert image_size(data) == ((50, 70) if orientation == 1 else None)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_other_formats_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8))
    data = by_pillow(stored, kind, exif=exif, lossless=True)
    assert exif_orientation(data) == orientation
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(decode_image(data), ImageOps.exif_transpose(opened).convert("RGB"))


def tiff_of(orientation: int) -> bytes:
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("start", [b"", b"Exif\0\0"])
def test_exif_of_a_webp_may_begin_as_that_of_a_jpeg(start):
    body = start + tiff_of(6)
    data = (
        b"RIFF\0\0\0\0WEBP" + b"ICCP" + struct.pack("<I", 3) + b"odd\0" + b"EXIF" + struct.pack("<I", len(body)) + body
    )
    assert exif_orientation(data) == 6
    assert exif_orientation(data[:-20]) == 1


@pytest.mark.parametrize(("name", "spoil", "expected"), [(b"eXIf", 0, 6), (b"eXIf", 1, 1), (b"IEND", 0, 1)])
def test_exif_of_a_png_counts_where_decoders_take_it(name, spoil, expected):
    def chunk(kind: bytes, body: bytes, spoil: int = 0) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ spoil)

    first = chunk(name, tiff_of(6), spoil)
    assert exif_orientation(b"\x89PNG\r\n\x1a\n" + first + chunk(b"IEND", b"") + chunk(b"eXIf", tiff_of(8))) == expected


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize("missing", [3, 100])
def test_truncated_images_are_refused(kind, missing):
    with pytest.raises(DecodeError):
        decode_image(encoded(kind)[:-missing])


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"\xff\xd8\xff", b"\xff\xd8\xff" + bytes(100), b"\x89PNG\r\n\x1a\n"]
)
def test_garbage_is_refused(data):
    with pytest.raises(DecodeError):
        decode_image(data)


def test_damaged_scan_data_is_refused():
    data = bytearray(encoded(".jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd0" * 20
    with pytest.raises(DecodeError, match="completely"):
        decode_image(bytes(data))


def test_enormous_claims_are_refused():
    data = bytearray(encoded(".jpg"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(DecodeError, match="60000 x 60000"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("window", "factor"), [((448, 448), 2), ((447, 448), 1), ((900, 900), 4), ((900, 500), 2), ((9000, 9000), 8)]
)
def test_reduction_never_goes_below_the_target(window, factor):
    assert reduction(*window, 224, 224) == factor


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_decoding_shows_the_same_picture(factor):
    image = picture(160, 120)
    small = decode_image(encoded(".jpg", image), factor)
    expected = cv2.resize(image, (120 // factor, 160 // factor), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - expected).mean() < 3
    assert decode_image(encoded(".jpg", picture(161, 119)), factor).shape[:2] == (-(-161 // factor), -(-119 // factor))
