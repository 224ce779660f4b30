"""Image bytes -> upright RGB pixels, complete or refused.

JPEGs go through simplejpeg (libjpeg-turbo), which is faster than the decoder inside OpenCV, gives the same
pixels, and can be told to refuse damaged data, which OpenCV accepts silently. Everything else goes through
OpenCV, which refuses truncated files of the other formats by itself. Every heavy call here releases the GIL.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import simplejpeg

from errors import UsageError

# Largest picture that is decoded; a damaged header may claim sizes that no memory holds.
MAX_PIXELS = 1 << 28

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_APP1, _SCAN = 0xE1, 0xDA
_EXIF_START = b"Exif\0\0"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ORIENTATION_TAG = 0x0112
_INKS = ("CMYK", "YCCK")
# Sizes that libjpeg-turbo can decode to with its fast reduced transforms, largest reduction first.
_DCT_REDUCTIONS = (8, 4, 2)
# Pictures of more bytes do not stay in a scratch buffer.
_LARGEST_SCRATCH = 1 << 26


class DecodeError(UsageError):
    """These bytes are no image, or not all of one; the message says why."""


class Scratch:
    """Memory to decode into again and again, for one thread; fresh pages cost a fifth of a small JPEG's decoding."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """At least `size` bytes, the same ones as last time unless those were too few."""
        if size > _LARGEST_SCRATCH:
            return np.empty(size, np.uint8)
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer


def is_jpeg(data: bytes | memoryview) -> bool:
    """Whether the bytes begin as a JPEG does."""
    return bytes(data[:3]) == _JPEG_START


def jpeg_header(data: bytes | memoryview) -> tuple[int, int, str, str]:
    """(height, width, colour space, subsampling of chroma) of a JPEG; ValueError for kinds that simplejpeg lacks."""
    try:
        return simplejpeg.decode_jpeg_header(data)
    except KeyError:
        # How it answers libjpeg-turbo's numbers that it has no name for, such as 4:4:1.
        raise ValueError("unusual subsampling of chroma") from None


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) in pixels of a JPEG that can be decoded at a reduced size, read from its header.

    Else None.
    """
    if not is_jpeg(data):
        return None
    try:
        height, width, colorspace, _ = jpeg_header(data)
    except ValueError:
        return None
    return None if colorspace in _INKS or exif_orientation(data) != 1 else (height, width)


def reduction(height: int, width: int, target_height: int, target_width: int) -> int:
    """How much smaller (1, 2, 4 or 8 times) a picture may be decoded and still be no smaller than its target."""
    for factor in _DCT_REDUCTIONS:
        if height >= factor * target_height and width >= factor * target_width:
            return factor
    return 1


def decode_image(data: bytes | memoryview, reduce: int = 1, scratch: Scratch | None = None) -> np.ndarray:
    """Decode to uint8 (H, W, 3), RGB: grey becomes three equal channels, EXIF rotation is applied, alpha is dropped.

    reduce: decode a JPEG for which `image_size` gave a size at 1/2, 1/4 or 1/8 of it (rounded up); its pixels
    are then libjpeg-turbo's means over blocks, not a sample of the full picture. scratch: the image may lie in it
    and is overwritten when it is used again. Raises DecodeError.
    """
    if not is_jpeg(data):
        return _decode_with_opencv(data)
    try:
        height, width, colorspace, _ = jpeg_header(data)
    except ValueError as error:
        return _decode_unusual_jpeg(data, error)
    if height * width > MAX_PIXELS:
        raise DecodeError(f"the JPEG claims {width} x {height} pixels, more than {MAX_PIXELS} in all")
    height, width = -(-height // reduce), -(-width // reduce)
    channels, kind = (4, "CMYK") if colorspace in _INKS else (3, "RGB")
    try:
        image = simplejpeg.decode_jpeg(
            data,
            colorspace=kind,
            min_height=height,
            min_width=width,
            buffer=scratch and scratch.take(height * width * channels),
        )
    except ValueError as error:
        raise DecodeError(f"the JPEG does not decode completely ({error})") from None
    if colorspace in _INKS:
        # Complete, as was just seen; OpenCV converts inks to RGB.
        return _decode_with_opencv(data)
    return turn_upright(image, exif_orientation(data))


def exif_orientation(data: bytes | memoryview) -> int:
    """How a JPEG, PNG or WebP is to be turned to stand upright, 1 (not at all) to 8, by EXIF's tag 0x0112."""
    if is_jpeg(data):
        start = _find_exif_in_jpeg(data)
    elif _is_webp(data):
        start = _find_exif_in_webp(data)
    else:
        start = _find_exif_in_png(data) if bytes(data[:8]) == _PNG_START else 0
    if not start:
        return 1
    order = "<" if data[start : start + 2] == b"II" else ">"
    try:
        directory = start + struct.unpack_from(order + "I", data, start + 4)[0]
        for entry in range(struct.unpack_from(order + "H", data, directory)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", data, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        # Not EXIF after all, or cut off: no orientation is given.
        pass
    return 1


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """The stored picture (H, W) or (H, W, C) as it is to be seen, by its EXIF orientation; contiguous."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _is_webp(data: bytes | memoryview) -> bool:
    return bytes(data[:4]) == b"RIFF" and bytes(data[8:12]) == b"WEBP"


def _find_exif_in_webp(data: bytes | memoryview) -> int:
    """Where the TIFF structure begins in a WebP, 0 where there is none."""
    place = 12
    while place + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        place += 8
        if name == b"EXIF":
            # Some programs put what a JPEG's segment begins with before it.
            return place + len(_EXIF_START) * (bytes(data[place : place + len(_EXIF_START)]) == _EXIF_START)
        place += length + length % 2
    return 0


def _find_exif_in_png(data: bytes | memoryview) -> int:
    """Where the TIFF structure begins in a PNG, 0 where there is none."""
    place = len(_PNG_START)
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if name == b"IEND":
            break
        if name == b"eXIf" and bytes(data[end : end + 4]) == zlib.crc32(data[place + 4 : end]).to_bytes(4, "big"):
            return place + 8
        place = end + 4
    return 0


def _find_exif_in_jpeg(data: bytes | memoryview) -> int:
    """Where the TIFF structure of the EXIF segment of a JPEG begins, 0 where there is none before the pixels."""
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF and data[place + 1] != _SCAN:
        if data[place + 1] == _APP1 and data[place + 4 : place + 10] == _EXIF_START:
            return place + 10
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    return 0


def _decode_unusual_jpeg(data: bytes | memoryview, error: ValueError) -> np.ndarray:
    """A JPEG whose header libjpeg-turbo's simple interface does not take, for example for its subsampling."""
    if bytes(data[-64:]).rstrip(b"\0")[-2:] != _JPEG_END:
        raise DecodeError(f"the JPEG does not decode completely ({error})")
    return _decode_with_opencv(data)


def _decode_with_opencv(data: bytes | memoryview) -> np.ndarray:
    image = None
    if len(data):
        try:
            # It would turn some formats upright by itself, not WebP; TIFF it turns in any case.
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error as error:
            raise DecodeError(f"OpenCV cannot decode it ({error.err or error})") from None
    if image is None:
        raise DecodeError("no complete image of a format that OpenCV reads" if len(data) else "it holds no image bytes")
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return turn_upright(image, exif_orientation(data))
