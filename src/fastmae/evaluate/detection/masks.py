"""Object masks: read from polygons or run lengths, kept as compressed run lengths (COCO's RLE), decoded when needed.

pycocotools does all conversions. It reads past the end of short run lengths and allocates as much memory as a polygon's
outline demands, so segmentations from files are checked here first; that needs our own reader of compressed run
lengths.

COCO's run lengths go down the columns and begin with background.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

MIN_COORDINATES = 6
"""Of a polygon: three points, x and y each."""
LONGEST_OUTLINE = 1 << 21
"""Of an object's polygons, in pixels, with one more for each point; COCO's longest one is a few thousand."""
MOST_RUNS, MOST_CHARACTERS = 1 << 22, 1 << 23
"""Of an object's run lengths, as numbers and as a string."""
MOST_CHARACTERS_OF_A_NUMBER = 7
"""35 bits; COCO's run lengths have 32."""
Size = tuple[int, int]
"""(width, height) in pixels."""


class RunLengths(msgspec.Struct):
    """A mask as COCO's files have it.

    Attributes:
        size: height and width.
        counts: run lengths down the columns, from background on; as numbers, or compressed.
    """

    size: tuple[float, float]
    counts: str | list[float]


Segmentation = list[list[float]] | RunLengths
"""Polygons [x, y, x, y, ...], or run lengths."""


def outline(segmentation: Segmentation, size: Size) -> float:
    """How much work its polygons are: the pixels along their edges, and their points. 0 for run lengths.

    Raises:
        ValueError: a polygon that does not fit the image; the message gives the reason.
    """
    return 0 if isinstance(segmentation, RunLengths) else sum(_outline(polygon, size) for polygon in segmentation)


def encode(segmentation: Segmentation, size: Size) -> bytes | None:
    """An annotation's `segmentation` as compressed run lengths.

    Args:
        segmentation: of which `outline` has checked the polygons.
        size: of the image.

    Returns:
        The compressed run lengths, or None if no polygon has three points.

    Raises:
        ValueError: run lengths that don't fit the image; the message gives the reason.
    """
    width, height = size
    if isinstance(segmentation, RunLengths):
        rle = {"size": [height, width], "counts": _checked_runs(segmentation, size)}
        return bytes(coco_mask.frPyObjects(rle, height, width)["counts"])
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


def _outline(polygon: Sequence[float], size: Size) -> float:
    """Pixels along a polygon's edges, by rows and columns, and one for each point.

    pycocotools takes five steps of 16 bytes for each of them. The edge that closes a polygon is no longer than the
    others together.
    """
    if len(polygon) % 2:
        raise ValueError("a polygon of its segmentation is not a list x, y, x, y, ...")
    coordinates = np.array(polygon)
    if len(polygon) and np.abs(coordinates).max() > 2 * max(size):
        raise ValueError("a polygon of its segmentation lies far outside the image")
    return float(np.abs(coordinates[2:] - coordinates[:-2]).sum()) + len(polygon) / 2


def _checked_runs(segmentation: RunLengths, size: Size) -> list[int]:
    """The run lengths of an RLE, which fill the image exactly."""
    width, height = size
    counts = segmentation.counts
    if tuple(segmentation.size) != (height, width):
        raise ValueError(f"its RLE is of size {[*segmentation.size]}, the image is [{height}, {width}] (height, width)")
    if len(counts) > (MOST_CHARACTERS if isinstance(counts, str) else MOST_RUNS):
        raise ValueError(f"its RLE has more than {MOST_RUNS:,} runs")
    runs = _read_compressed(counts) if isinstance(counts, str) else np.array(counts, dtype=np.float64)
    if not ((runs >= 0) & (runs < 1 << 32) & (runs == np.floor(runs))).all():
        raise ValueError("the counts of its RLE are not run lengths")
    whole = runs.astype(np.int64)
    total = int(whole.sum())
    if total != width * height:
        raise ValueError(f"the runs of its RLE are {total} pixels in all, the image has {width * height}")
    runs_in_order: list[int] = whole.tolist()
    return runs_in_order


def _read_compressed(text: str) -> np.ndarray:
    """Compressed run lengths as numbers, int64.

    Each character holds, from 48 up, 5 bits of a number, the lowest bits first; bit 32 announces another character, and
    bit 16 of the last one is the sign. From the fourth number on, it is the difference to the run two before.
    """
    bits = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)  # the last character of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1 if len(ends) else np.zeros(0, dtype=np.int64)
    is_cut_off = len(bits) != int(lengths.sum())
    if is_cut_off or not ((bits >= 0) & (bits < 64)).all() or lengths.max(initial=0) > MOST_CHARACTERS_OF_A_NUMBER:
        raise ValueError("the counts of its RLE are no string of run lengths")
    if not len(bits):
        return bits
    places = np.arange(len(bits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((bits & 31) << (5 * places), starts)
    runs -= np.where(bits[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
