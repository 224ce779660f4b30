"""JPEG -> its Y, U and V planes as stored, through the system's libturbojpeg.

The wheels that decode JPEGs bundle libjpeg-turbo too, but hand out RGB only. An image that becomes a smaller JPEG needs
no RGB: without upsampling its chroma and converting colours there and back a seventh of the work is saved.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from data_prep.decode import DecodeError, Scratch
from data_prep.turbojpeg import load_library


class Planes(NamedTuple):
    """A picture as 4:2:0 JPEGs store it: uint8 y (H, W), u and v (H / 2, W / 2), rounded up."""

    y: np.ndarray
    u: np.ndarray
    v: np.ndarray

    def crop(self, top: int, left: int, height: int, width: int) -> Planes:
        """A window of the picture, moved up and left by at most a pixel: a sample of chroma covers two."""
        top, left = top // 2, left // 2
        half = slice(top, top + -(-height // 2)), slice(left, left + -(-width // 2))
        return Planes(self.y[2 * top : 2 * top + height, 2 * left : 2 * left + width], self.u[half], self.v[half])

    def resize(self, height: int, width: int) -> Planes:
        """Every plane resized bilinearly, none when the picture has that size."""
        if self.y.shape == (height, width):
            return self
        half = -(-width // 2), -(-height // 2)
        return Planes(cv2.resize(self.y, (width, height)), cv2.resize(self.u, half), cv2.resize(self.v, half))

    def encode(self, quality: int) -> bytes:
        """A 4:2:0 JPEG of them; quality 1-100."""
        u, v = np.ascontiguousarray(self.u), np.ascontiguousarray(self.v)
        return simplejpeg.encode_jpeg_yuv_planes(_with_even_edges(self.y), u, v, quality)


def _with_even_edges(y: np.ndarray) -> np.ndarray:
    """The plane, in memory that goes on with its last row and column where it ends inside a sample of chroma.

    The encoder reads on up to there, whatever the array's bounds.
    """
    height, width = y.shape
    if height % 2 == width % 2 == 0:
        return np.ascontiguousarray(y)
    padded = np.empty((height + height % 2, width + width % 2), np.uint8)
    padded[:height, :width] = y
    padded[:height, width:] = y[:, -1:]
    padded[height:] = padded[height - 1]
    return padded[:height, :width]


class PlaneDecoder:
    """Decoder of 4:2:0 JPEGs, for one thread. Raises UsageError where libturbojpeg is not installed."""

    def __init__(self) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p(self._library.tjInitDecompress())
        self._scratch = Scratch()

    def decode(self, data: bytes, height: int, width: int) -> Planes:
        """Planes of a 4:2:0 JPEG of `height` x `width`, or that is 2, 4 or 8 times as large (rounded up).

        They lie in memory that the next call overwrites. Raises DecodeError.
        """
        half_height, half_width = -(-height // 2), -(-width // 2)
        # Luma has a row and a column more where chroma covers one more than the picture has.
        shapes = (2 * half_height, 2 * half_width), (half_height, half_width), (half_height, half_width)
        memory, start, planes = self._scratch.take(6 * half_height * half_width), 0, []
        for rows, columns in shapes:
            planes.append(memory[start : start + rows * columns].reshape(rows, columns))
            start += rows * columns
        pointers = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in planes))
        if self._library.tjDecompressToYUVPlanes(self._handle, data, len(data), pointers, width, None, height, 0):
            reason = self._library.tjGetErrorStr2(self._handle).decode("utf-8", "replace")
            raise DecodeError(f"the JPEG does not decode completely ({reason})")
        y, u, v = planes
        return Planes(y[:height, :width], u, v)
