"""An object's mask: polygons or run lengths in, run lengths (RLE) kept, pixels when they are needed.

COCO runs down the columns, the first run is of background, and its compressed form is 5 bits a character. The only place that
knows pycocotools' mask functions.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

LEAST_NUMBERS = 6
"""Of a polygon: three points, x and y each."""
LARGEST_RUNS = 1 << 31
"""Pixels of a mask: what COCO's run lengths can count."""
Size = tuple[int, int]
"""(width, height) in pixels."""


def encode(segmentation: Any, size: Size) -> bytes | None:
    """An annotation's `segmentation` as compressed run lengths.

    Args:
        segmentation: a list of polygons [x, y, x, y, ...], or {"size": [height, width], "counts": run lengths or a string}.
        size: of the image.

    Returns:
        The counts, or None when no polygon has three points.

    Raises:
        ValueError: neither, or one that does not fit the image; the message is the reason.
    """
    width, height = size
    if isinstance(segmentation, dict):
        return _of_runs(_checked_runs(segmentation, size), size)
    if not isinstance(segmentation, list):
        raise ValueError("its segmentation is neither a list of polygons nor an RLE")
    polygons = [polygon for polygon in segmentation if _checked(polygon, size)]
    return bytes(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]) if polygons else None


def decode(counts: bytes, size: Size, shown: Size | None = None) -> np.ndarray:
    """Run lengths -> uint8 [height, width] of 0 and 1, at another size where `shown` says so (the nearest pixel)."""
    columns = coco_mask.decode(_as_rle(counts, size)).T  # as it lies in memory: [width, height]
    if shown is not None and shown != size:
        columns = np.asarray(Image.fromarray(columns).resize((shown[1], shown[0]), Image.Resampling.NEAREST))
    return np.ascontiguousarray(columns.T)


def area(counts: bytes, size: Size) -> float:
    """Pixels of a mask."""
    return float(coco_mask.area(_as_rle(counts, size)))


def bounds(counts: bytes, size: Size) -> list[float]:
    """[x, y, width, height] around a mask, in pixels."""
    return [float(value) for value in coco_mask.toBbox(_as_rle(counts, size))]


def paste(mask: torch.Tensor, box: Sequence[float], size: Size) -> bytes:
    """A predicted mask, in its place in the image, as run lengths.

    Sampled at the centre of each pixel that the box touches: an object's edge falls within the pixel, where rounding the box
    first would move it by up to one.

    Args:
        mask: float32 [S, S] of probabilities over the box.
        box: (left, top, right, bottom) in pixels of the image.
        size: of the image.
    """
    width, height = size
    whole = np.zeros((height, width), dtype=np.uint8, order="F")
    left, top, right, bottom = box
    cols, rows = _pixels(left, right, width), _pixels(top, bottom, height)
    if len(rows) and len(cols) and right > left and bottom > top:
        across = 2 * (cols + 0.5 - left) / (right - left) - 1
        down = 2 * (rows + 0.5 - top) / (bottom - top) - 1
        places = torch.stack(torch.broadcast_tensors(across[None, :], down[:, None]), dim=-1)
        sampled = F.grid_sample(
            mask[None, None], places[None], mode="bilinear", padding_mode="border", align_corners=False
        )[0, 0]
        within = (across.abs() <= 1)[None, :] & (down.abs() <= 1)[:, None]
        whole[int(rows[0]) : int(rows[-1]) + 1, int(cols[0]) : int(cols[-1]) + 1] = ((sampled >= 0.5) & within).numpy()
    return bytes(coco_mask.encode(whole)["counts"])


def _pixels(low: float, high: float, side: int) -> torch.Tensor:
    """Numbers of the pixels that the interval touches, of those from 0 to `side`."""
    first = max(0, int(low))
    return torch.arange(first, max(first, min(side, int(np.ceil(high)))))


def _as_rle(counts: bytes, size: Size) -> dict[str, Any]:
    return {"size": [size[1], size[0]], "counts": counts}


def _checked(polygon: Any, size: Size) -> bool:
    """Whether a polygon has three points; pycocotools trusts what it is given, so all else is looked at first."""
    try:
        numbers = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("a polygon of its segmentation is not a list of numbers") from error
    if numbers.ndim != 1 or len(numbers) % 2:
        raise ValueError("a polygon of its segmentation is not a list x, y, x, y, ...")
    reach = 2 * max(size)
    if not (np.abs(numbers) <= reach).all():
        raise ValueError("a polygon of its segmentation lies far outside the image, or holds what is no number")
    return len(numbers) >= LEAST_NUMBERS


def _checked_runs(segmentation: dict[str, Any], size: Size) -> list[int]:
    width, height = size
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        raise ValueError(
            f"its RLE is of size {segmentation.get('size')}, the image is [{height}, {width}] (height, width)"
        )
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and 0 <= run < LARGEST_RUNS for run in runs):
        raise ValueError("the counts of its RLE are not run lengths")
    if sum(runs) != width * height:
        raise ValueError(f"the runs of its RLE are {sum(runs)} pixels in all, the image has {width * height}")
    return runs


def _of_runs(runs: list[int], size: Size) -> bytes:
    return bytes(coco_mask.frPyObjects({"size": [size[1], size[0]], "counts": runs}, size[1], size[0])["counts"])


def _runs_of_text(text: str) -> list[int]:
    """Compressed counts as run lengths: 5 bits a character from 48 on, the lowest first; bit 32 says that more follow, and from the
    third on a run is the difference to the one two before. (pycocotools decodes a string that is too short into what lies in memory.)
    """
    runs: list[int] = []
    bits = itertools.chain(text.encode("ascii", "replace"))
    for first in bits:
        value, shift, character = 0, 0, first
        while True:
            code = character - 48
            value |= (code & 31) << shift
            shift += 5
            if not code & 32:
                break
            character = next(bits, 48)
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
