"""What becomes of an image on its way into a pack.

Passed through untouched, or made upright RGB and encoded.
"""

from __future__ import annotations

import functools
import re

import cv2
import numpy as np
import simplejpeg

from data_prep.conversion import AS_IS, DECODE, GREY, JPEG, MARKERS, PNG, Conversion
from data_prep.decode import (
    MAX_PIXELS,
    DecodeError,
    decode_image,
    exif_orientation,
    image_size,
    is_jpeg,
    jpeg_header,
    reduction,
    turn_upright,
)
from data_prep.planes import PlaneDecoder

_PLAIN_JPEG = "YCbCr"
_INKS = ("CMYK", "YCCK")
_JPEG_START, _JPEG_END, _SCAN = b"\xff\xd8", b"\xd9", b"\xda"
# Inside a scan 0xFF is data when a zero follows, and a restart marker does not end the scan.
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def convert(data: bytes, conversion: Conversion) -> bytes:
    """Bytes to pack for the image file `data`; DecodeError when it does not decode completely.

    A colour JPEG that stands upright and has the wanted size already is returned untouched.
    """
    if not data:
        raise DecodeError("the file is empty")
    if conversion.pass_through:
        check_complete(data, conversion.check)
        return data
    size = image_size(data)
    if size is not None and _is_wanted(data, size, conversion):
        check_complete(data, conversion.check)
        return data
    try:
        return _convert(data, size, conversion)
    except (ValueError, cv2.error) as error:
        # For example a side of more than 65,500 pixels, which JPEG does not hold.
        raise DecodeError(f"it cannot be converted ({error})") from None


def _convert(data: bytes, size: tuple[int, int] | None, conversion: Conversion) -> bytes:
    if conversion.yuv_planes and size is not None and _has_halved_chroma(data, size):
        return _convert_planes(data, size, conversion)
    image = _decode(data, size, conversion)
    if conversion.center_crop:
        top, left, edge = _middle_square(*image.shape[:2])
        image = image[top : top + edge, left : left + edge]
    height, width = target_size(*image.shape[:2], conversion.resize)
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height))
    return _encode(image, conversion)


def check_complete(data: bytes, check: str = DECODE) -> None:
    """Raise DecodeError unless the image is complete, by decoding it or (a JPEG) by following its markers.

    Of a decoded JPEG all coefficients are read, but only an eighth of the pixels are computed: half the time.
    """
    if check == MARKERS and is_jpeg(data) and jpeg_reaches_its_end(data):
        return
    if not is_jpeg(data):
        decode_image(data)
        return
    try:
        colorspace = jpeg_header(data)[2]
        inks = colorspace in _INKS
        simplejpeg.decode_jpeg(data, colorspace="CMYK" if inks else "GRAY", min_height=1, min_width=1)
    except ValueError:
        # Rare kinds that this decoder does not take are left to the full one, which also words the error.
        decode_image(data)


def jpeg_reaches_its_end(data: bytes) -> bool:
    """Whether a JPEG's segments and scans follow each other up to the end marker, and nothing comes after it."""
    place = len(_JPEG_START)
    while True:
        # A segment: 0xFF (more of them fill), its kind, two bytes of length that count themselves.
        start = place
        while data[place : place + 1] == b"\xff":
            place += 1
        kind = data[place : place + 1]
        if kind == _JPEG_END and place > start:
            return not data[place + 1 :].strip(b"\0")
        if place == start or place + 3 > len(data):
            return False
        place += 1 + int.from_bytes(data[place + 1 : place + 3], "big")
        if kind == _SCAN:
            found = _MARKER_IN_SCAN.search(data, place)
            if found is None:
                return False
            place = found.start()


def target_size(height: int, width: int, short_edge: int) -> tuple[int, int]:
    """(height, width) with the short edge `short_edge` and the long one rounded down; 0 leaves the size."""
    if not short_edge:
        return height, width
    if height > width:
        return height * short_edge // width, short_edge
    return short_edge, width * short_edge // height


def _is_wanted(data: bytes, size: tuple[int, int], conversion: Conversion) -> bool:
    """Whether a JPEG that is upright and whose colours are no inks can go into the pack as it is."""
    if conversion.encoding != JPEG or conversion.color == GREY:
        return False
    if jpeg_header(data)[2] != _PLAIN_JPEG:
        return False
    square = size[0] == size[1]
    return min(size) == (conversion.resize or min(size)) and (square or not conversion.center_crop)


def _middle_square(height: int, width: int) -> tuple[int, int, int]:
    """(top, left, edge) of the largest square in the middle."""
    edge = min(height, width)
    return (height - edge) // 2, (width - edge) // 2, edge


def _has_halved_chroma(data: bytes, size: tuple[int, int]) -> bool:
    """Whether a JPEG of this size, upright and without inks, stores its chroma at half resolution both ways."""
    return size[0] * size[1] <= MAX_PIXELS and jpeg_header(data)[2:] == (_PLAIN_JPEG, "420")


def _convert_planes(data: bytes, size: tuple[int, int], conversion: Conversion) -> bytes:
    """What `convert` does, on the planes of a JPEG whose chroma is halved."""
    reduce = _reduction(size, conversion)
    planes = _plane_decoder().decode(data, -(-size[0] // reduce), -(-size[1] // reduce))
    if conversion.center_crop:
        top, left, edge = _middle_square(*planes.y.shape)
        planes = planes.crop(top, left, edge, edge)
    return planes.resize(*target_size(*planes.y.shape, conversion.resize)).encode(conversion.quality)


@functools.cache
def _plane_decoder() -> PlaneDecoder:
    """The decoder of this process: images are converted by one thread."""
    return PlaneDecoder()


def _reduction(size: tuple[int, int] | None, conversion: Conversion) -> int:
    """How much smaller a JPEG of this size may be decoded, given what it is to be resized to."""
    if size is None or not conversion.resize:
        return 1
    return reduction(*size, *target_size(*size, conversion.resize))


def _decode(data: bytes, size: tuple[int, int] | None, conversion: Conversion) -> np.ndarray:
    """RGB, grey or (color AS_IS) whatever the file holds, at a reduced size where the target allows it."""
    image = decode_image(data, _reduction(size, conversion))
    if conversion.color == GREY:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if conversion.color == AS_IS:
        # The complete decode above is the check; this one keeps alpha, grey and 16 bits, and turns nothing upright.
        raw = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        raw = turn_upright(raw, exif_orientation(data))
        if raw.ndim == 3:
            raw = cv2.cvtColor(raw, cv2.COLOR_BGRA2RGBA if raw.shape[2] == 4 else cv2.COLOR_BGR2RGB)
        return raw
    return image


def _encode(image: np.ndarray, conversion: Conversion) -> bytes:
    image = np.ascontiguousarray(image)
    if conversion.encoding == PNG:
        if image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR)
        return cv2.imencode(PNG, image, [cv2.IMWRITE_PNG_COMPRESSION, conversion.quality])[1].tobytes()
    if image.dtype != np.uint8:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if image.ndim == 2:
        return simplejpeg.encode_jpeg(image[..., None], conversion.quality, "GRAY", "Gray")
    # Chroma at half resolution, as OpenCV's encoder in MXNet's tool stores it.
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image[..., :3]), conversion.quality, "RGB", "420")
