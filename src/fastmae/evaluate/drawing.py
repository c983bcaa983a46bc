"""Drawing shared by `segment` and `detect`: choosing images, the hues of classes, PNG bytes."""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

mpl.use("agg")

GOLDEN_RATIO = 0.618034
"""Step between the hues of consecutive classes, as part of the colour circle. No two of any number are alike."""


def class_hue(number: int, start: float = 0.0) -> float:
    """Hue of a class in [0, 1); `start` is the hue of class 0."""
    return (start + number * GOLDEN_RATIO) % 1


def evenly_spaced(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, the first and the last among them, evenly spaced."""
    positions = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[position] for position in positions]


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
