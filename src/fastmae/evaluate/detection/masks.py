"""Object masks: read from polygons or run lengths, kept as compressed run lengths (COCO's RLE), decoded when needed.

pycocotools does all conversions. It reads past the end of short run lengths and allocates as much memory as a polygon's
extent demands, so segmentations from files are checked here first; that needs our own reader of compressed run lengths.

COCO's run lengths go down the columns and begin with background.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

MIN_COORDINATES = 6
"""Of a polygon: three points, x and y each."""
MAX_PIXELS = 1 << 31
"""Of a mask: COCO's run lengths can't count further."""
Size = tuple[int, int]
"""(width, height) in pixels."""


def encode(segmentation: Any, size: Size) -> bytes | None:
    """An annotation's `segmentation` as compressed run lengths.

    Args:
        segmentation: a list of polygons [x, y, x, y, ...], or {"size": [height, width], "counts": numbers or a string}.
        size: of the image.

    Returns:
        The compressed run lengths, or None if no polygon has three points.

    Raises:
        ValueError: neither of these, or it does not fit the image; the message gives the reason.
    """
    width, height = size
    if isinstance(segmentation, dict):
        rle = {"size": [height, width], "counts": _checked_runs(segmentation, size)}
        return bytes(coco_mask.frPyObjects(rle, height, width)["counts"])
    if not isinstance(segmentation, list):
        raise ValueError("its segmentation is neither a list of polygons nor an RLE")
    for polygon in segmentation:
        _check_polygon(polygon, size)
    polygons = [polygon for polygon in segmentation if len(polygon) >= MIN_COORDINATES]
    return bytes(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]) if polygons else None


def decode(counts: bytes, size: Size, output_size: Size | None = None) -> np.ndarray:
    """Compressed run lengths -> uint8 [height, width] of 0 and 1.

    Args:
        counts: the run lengths.
        size: of the mask.
        output_size: another size of the result, by nearest neighbour; None for the mask's own.
    """
    columns = coco_mask.decode(_rle(counts, size)).T  # [width, height], contiguous
    if output_size is not None and output_size != size:
        width, height = output_size
        columns = np.asarray(Image.fromarray(columns).resize((height, width), Image.Resampling.NEAREST))
    return np.ascontiguousarray(columns.T)


def area(counts: bytes, size: Size) -> float:
    """Number of pixels in a mask."""
    return float(coco_mask.area(_rle(counts, size)))


def paste(mask: torch.Tensor, box: Sequence[float], size: Size) -> bytes:
    """A predicted mask at its box in the image, as compressed run lengths.

    The mask is sampled at the centre of each pixel that the box touches. Rounding the box to whole pixels first, as
    torchvision does, would move the object's edge by up to a pixel.

    Args:
        mask: float32 [S, S], probabilities over the box.
        box: (left, top, right, bottom) in pixels of the image.
        size: of the image.
    """
    width, height = size
    left, top, right, bottom = box
    pasted = np.zeros((height, width), dtype=np.uint8, order="F")
    cols, rows = _touched_pixels(left, right, width), _touched_pixels(top, bottom, height)
    if len(rows) and len(cols) and right > left and bottom > top:
        # Pixel centres in the box's own coordinates, from -1 to 1
        x = 2 * (cols + 0.5 - left) / (right - left) - 1
        y = 2 * (rows + 0.5 - top) / (bottom - top) - 1
        centres = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
        probabilities = F.grid_sample(
            mask[None, None], centres[None], mode="bilinear", padding_mode="border", align_corners=False
        )[0, 0]
        inside = (x.abs() <= 1)[None, :] & (y.abs() <= 1)[:, None]
        window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
        pasted[window] = ((probabilities >= 0.5) & inside).numpy()
    return bytes(coco_mask.encode(pasted)["counts"])


def _touched_pixels(low: float, high: float, side: int) -> torch.Tensor:
    """Indices of the pixels from 0 to `side` that the interval touches."""
    first = max(0, int(low))
    return torch.arange(first, max(first, min(side, int(np.ceil(high)))))


def _rle(counts: bytes, size: Size) -> dict[str, Any]:
    width, height = size
    return {"size": [height, width], "counts": counts}


def _check_polygon(polygon: Any, size: Size) -> None:
    try:
        coordinates = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("a polygon of its segmentation is not a list of numbers") from error
    if coordinates.ndim != 1 or len(coordinates) % 2:
        raise ValueError("a polygon of its segmentation is not a list x, y, x, y, ...")
    if not (np.abs(coordinates) <= 2 * max(size)).all():
        raise ValueError("a polygon of its segmentation lies far outside the image, or holds NaN")


def _checked_runs(segmentation: dict[str, Any], size: Size) -> list[int]:
    """The run lengths of an RLE, which fill the image exactly."""
    width, height = size
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        raise ValueError(
            f"its RLE is of size {segmentation.get('size')}, the image is [{height}, {width}] (height, width)"
        )
    runs = _read_compressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and 0 <= run < MAX_PIXELS for run in runs):
        raise ValueError("the counts of its RLE are not run lengths")
    if sum(runs) != width * height:
        raise ValueError(f"the runs of its RLE are {sum(runs)} pixels in all, the image has {width * height}")
    return runs


def _read_compressed(text: str) -> list[int]:
    """Compressed run lengths as numbers.

    Each character holds, from 48 up, 5 bits of a number, the lowest bits first; bit 32 announces another character, and
    bit 16 of the last one is the sign. From the fourth number on, it is the difference to the run two before.
    """
    runs: list[int] = []
    characters = itertools.chain(text.encode("ascii", "replace"))
    for first in characters:
        value, shift, character = 0, 0, first
        while True:
            bits = character - 48
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                break
            character = next(characters, 48)
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
