"""Values of more than 8 bits -> 8 bits: which value becomes black, and which white.

Files of 16-bit, integer or float values often use a small part of what their type can hold: 12 of 16 bits, Hounsfield
units, metres. Taken by the type's range, such a picture is almost black. So a store has a value range, as text:

- `auto`: the type's own range (`decode`)
- `file`: each image's own, from its 0.5th to its 99.5th percentile
- `LOW HIGH`: the same two values for all images

A value v becomes round((v - LOW) / (HIGH - LOW) x 255), at least 0 and at most 255; NaN becomes 0. Pictures of 8 bits
are not changed, but arrays (.npy) of 8 bits are.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from fastmae.errors import InputError

AUTO, FILE = "auto", "file"
PERCENTILES = (0.5, 99.5)
"""Of values that become black and white. A few hot pixels, or a metal implant, must not make the rest grey."""
FILE_VALUES = 1 << 18
"""About as many values of an image tell its percentiles."""
STRIP_VALUES = 1 << 20
"""Values that are mapped at a time, so that a large image takes little memory beside itself."""


def text_of(low: float, high: float) -> str:
    """Two values as a value range: `-1000 400`. Read back, they are the same numbers."""
    return " ".join(repr(float(value)).removesuffix(".0") for value in (low, high))


@cache
def bounds_of(value_range: str) -> tuple[float, float] | None:
    """LOW and HIGH of a value range; None for `auto` and `file`.

    Raises:
        InputError: neither a word nor two numbers, the smaller first.
    """
    if value_range in (AUTO, FILE):
        return None
    try:
        low, high = (float(part) for part in value_range.split())
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"no value range: {value_range!r}; it is auto, file, or two numbers, the smaller first")
    return low, high


def range_entry(value_range: str) -> dict[str, str]:
    """What a description records of it: nothing for `auto`, so that descriptions from before it had a name agree."""
    return {} if value_range == AUTO else {"value_range": value_range}


def to_8_bits(values: np.ndarray, value_range: str) -> np.ndarray:
    """Map an image's values.

    Args:
        values: integers or floats [H, W] or [H, W, K]. All channels have one range.
        value_range: `file` or `LOW HIGH`.

    Returns:
        uint8, of the same shape. An image of one value is black.
    """
    low, high = bounds_of(value_range) or percentiles(sample_of(values, FILE_VALUES))
    if not low < high:
        return np.zeros(values.shape, np.uint8)

    def mapped(strip: np.ndarray) -> np.ndarray:
        scaled = np.rint((strip.astype(np.float64) - low) / (high - low) * 255)
        return np.nan_to_num(scaled.clip(0, 255), copy=False)

    return in_strips(values, mapped)


def by_type(values: np.ndarray) -> np.ndarray:
    """`auto` for an image that Pillow reads, [H, W] -> uint8: of integers of 16 bits and more, the high byte of the 16.

    A float image declares no range: it is [0, 1] if no value is above 1, else [0, 255].
    """
    if values.dtype.kind in "iu":
        return in_strips(values, lambda strip: strip.clip(0, 65535) >> 8)
    scale = 255.0 if np.nanmax(values, initial=0.0) <= 1.0 else 1.0
    return in_strips(values, lambda strip: (np.nan_to_num(strip.astype(np.float64)) * scale).clip(0, 255))


def in_strips(values: np.ndarray, mapped: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`mapped` of some rows at a time, as uint8."""
    result, rows = np.empty(values.shape, np.uint8), max(1, STRIP_VALUES // max(1, values[0].size))
    with np.errstate(all="ignore"):  # floats may hold anything
        for start in range(0, len(values), rows):
            result[start : start + rows] = mapped(values[start : start + rows])
    return result


def sample_of(values: np.ndarray, most: int) -> np.ndarray:
    """About `most` of an image's values, evenly spaced, without NaN and infinity: float64 [n]."""
    step = math.ceil(math.sqrt(max(1, values.size / most)))
    sample = values[::step, ::step].astype(np.float64).ravel()
    return sample[np.isfinite(sample)]


def percentiles(sample: np.ndarray) -> tuple[float, float]:
    """The values that become black and white. Where nearly all values are the same: the smallest and the largest."""
    if not len(sample):
        return 0.0, 0.0
    low, high = np.percentile(sample, PERCENTILES)
    if low == high:
        low, high = sample.min(), sample.max()
    return float(low), float(high)
