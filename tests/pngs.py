"""Reads the PNG files that the package writes."""

from io import BytesIO

import numpy as np
from PIL import Image


def pixels(data: bytes) -> list[list[tuple[int, ...]]]:
    """The pixels of a PNG file of one channel or three, row by row."""
    with Image.open(BytesIO(data), formats=["PNG"]) as picture:
        assert picture.mode in ("L", "RGB")
        found = np.asarray(picture).reshape(picture.height, picture.width, -1)
    return [[tuple(pixel) for pixel in row] for row in found.tolist()]
