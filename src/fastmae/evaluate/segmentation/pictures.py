"""A sheet of photos with their masks, true and predicted, and the classes' colours. Gives a PNG's bytes."""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from fastmae.evaluate.segmentation.layout import IGNORED

mpl.use("agg")

FIRST = [
    mpl.color_sequences["tab20"][number] for number in (*range(0, 20, 2), *range(1, 20, 2)) if number not in (14, 15)
]
"""Colours of the first classes: Matplotlib's set of easily told ones without its greys, the strong ones before their pale kin."""
GOLDEN = 0.618034
"""Of a turn, from one hue to the next of all further classes: no two that are near in number are near in colour."""
TONES = ((0.62, 0.88), (0.85, 0.62), (0.38, 0.95), (0.9, 0.85), (0.5, 0.55))
"""Saturation and value, taken in turn."""
IGNORED_COLOUR = (0.93, 0.93, 0.93)
LEGEND_AT_MOST = 30
"""Classes in the legend: those that take most of the shown masks."""
WIDTH = 3.0
"""Of a picture, in inches."""


@dataclass(frozen=True)
class Shown:
    """A row of the sheet.

    Attributes:
        photo: uint8 [h, w, 3].
        truth: uint8 [H, W].
        predicted: uint8 [H, W].
    """

    photo: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


def palette(classes: int) -> np.ndarray:
    """A colour an id, float [256, 3] in [0, 1]; pale grey for what is ignored."""
    colours = np.tile(np.array(IGNORED_COLOUR), (IGNORED + 1, 1))
    for number in range(classes):
        hue = (0.58 + number * GOLDEN) % 1
        colours[number] = (
            FIRST[number] if number < len(FIRST) else colorsys.hsv_to_rgb(hue, *TONES[number % len(TONES)])
        )
    return colours


def sheet(rows: Sequence[Shown], names: Sequence[str]) -> bytes:
    """Photo, truth and prediction side by side, an image a row, over a legend of the classes that are seen in them.

    Args:
        rows: at least one.
        names: of the classes.
    """
    colours = palette(len(names))
    heights = [WIDTH * row.truth.shape[0] / row.truth.shape[1] for row in rows]
    legend = _legend(rows, names, colours)
    columns = max(1, min(5, 60 // max(len(str(patch.get_label())) for patch in legend)))
    for_legend = 0.22 * -(-len(legend) // columns) + 0.2
    spacing = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(3 * WIDTH + 0.2, sum(heights) + 0.06 * len(rows) + for_legend + 0.3), layout=spacing)
    grid = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, row in zip(grid, rows, strict=True):
        for cell, picture in zip(axes, (row.photo, colours[row.truth], colours[row.predicted]), strict=True):
            cell.imshow(picture, interpolation="nearest", extent=(0, row.truth.shape[1], row.truth.shape[0], 0))
            cell.set_axis_off()
    for cell, title in zip(grid[0], ("photo", "truth", "prediction"), strict=True):
        cell.set_title(title, fontsize=11)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=1.2
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _legend(rows: Sequence[Shown], names: Sequence[str], colours: np.ndarray) -> list[Patch]:
    """The classes that are seen, in the order of their ids; of too many those with the largest area."""
    seen = sum(
        np.bincount(part.ravel(), minlength=IGNORED + 1) / part.size
        for row in rows
        for part in (row.truth, row.predicted)
    )
    area: np.ndarray = np.asarray(seen)
    largest = sorted(np.argsort(-area[: len(names)], kind="stable")[:LEGEND_AT_MOST].tolist())
    patches = [Patch(color=tuple(colours[number]), label=names[number]) for number in largest if area[number]]
    ignored = (
        [Patch(facecolor=IGNORED_COLOUR, edgecolor="0.6", linewidth=0.5, label="ignored")] if area[IGNORED] else []
    )
    return [*patches, *ignored]
