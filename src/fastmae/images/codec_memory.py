"""How much memory Pillow takes to decode an image, from its header.

The figures per pixel were measured with Pillow 13 on images of 134 megapixels.
"""

import io
import math
import os
from typing import IO

from PIL import ImageFile

WEBP_BYTES, AVIF_BYTES = 12, 10
"""Bytes per pixel, besides the image's own: WebP's canvas, the one before it and a copy; AVIF's planes and a copy."""
JPEG2000_BYTES = 6
"""Bytes per pixel and channel of a tile."""
TIFF_ROWS, TIFF_TILE_WIDTH, TIFF_TILE_HEIGHT, TIFF_BITS = 278, 322, 323, 258


def bytes_per_pixel(mode: str) -> int:
    """What Pillow keeps of each pixel."""
    return {"1": 1, "L": 1, "P": 1}.get(mode, 2 if mode.startswith("I;16") else 4)


def codec_bytes(image: ImageFile.ImageFile) -> int:
    """Most memory that the codec takes besides the image's own pixels.

    Args:
        image: opened, and neither drafted nor loaded.
    """
    file, pixels = image.fp, math.prod(image.size)
    assert file is not None
    in_memory = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else 0
    match image.format:
        case "JPEG" | "MPO":
            return in_memory + _jpeg_bytes(image)
        case "WEBP":
            return in_memory + _size(file) + WEBP_BYTES * pixels
        case "AVIF":
            return in_memory + _size(file) + AVIF_BYTES * pixels
        case "JPEG2000":
            return in_memory + JPEG2000_BYTES * len(image.getbands()) * min(pixels, _jpeg2000_tile(file))
        case "TIFF":
            return in_memory + _tiff_bytes(image)
    return in_memory


def _jpeg_bytes(image: ImageFile.ImageFile) -> int:
    """The coefficients of the whole image, 2 bytes each, unless all channels come block by block."""
    layers: list[tuple[int, int, int, int]] = image.layer  # type: ignore[attr-defined]  # of a JPEG
    assert image.fp is not None
    if "progressive" not in image.info and _is_interleaved(image.fp, len(layers)):
        return 0
    _, across, down, _ = (max(column) for column in zip(*layers, strict=True))
    samples = sum(h * v for _, h, v, _ in layers) / (across * down)
    return math.ceil(2 * samples * math.prod(image.size))


def _is_interleaved(file: IO[bytes], channels: int) -> bool:
    """Whether the first scan, behind whose header Pillow stops reading, has all channels."""
    end = file.tell()
    length = 6 + 2 * channels
    if end < length:
        return False
    file.seek(end - length)
    header = file.read(3)
    file.seek(end)
    return header == bytes([0, length, channels])


def _jpeg2000_tile(file: IO[bytes]) -> int:
    """Pixels of a tile; without a header in the file's first bytes, more than any image has."""
    position = file.tell()
    file.seek(0)
    _, found, header = file.read(1 << 16).partition(b"\xff\x4f\xff\x51")
    file.seek(position)
    if not found or len(header) < 28:
        return 1 << 62
    return math.prod(int.from_bytes(header[at : at + 4], "big") for at in (20, 24))


def _tiff_bytes(image: ImageFile.ImageFile) -> int:
    """A strip or tile, which libtiff decodes whole. Values that are not compressed are read row by row."""
    if not image.tile or image.tile[0].codec_name != "libtiff":
        return 0
    tags = image.tag_v2  # type: ignore[attr-defined]  # of a TIFF
    width, height = image.size
    rows, tile_width = tags.get(TIFF_TILE_HEIGHT, tags.get(TIFF_ROWS, height)), tags.get(TIFF_TILE_WIDTH, width)
    bits = tags.get(TIFF_BITS, (1,))
    pixel_bytes = max(4, sum(bits if isinstance(bits, tuple) else (bits,)) // 8)
    return int(min(rows, height) * min(tile_width, width)) * pixel_bytes


def _size(file: IO[bytes]) -> int:
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size
