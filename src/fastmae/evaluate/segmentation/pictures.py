"""Draws photos beside their true and predicted masks, with a legend of the classes."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from fastmae.evaluate.drawing import class_hue, label, png_bytes, text_as_it_is
from fastmae.evaluate.segmentation.masks import IGNORED

TAB20_STRONG_FIRST = (*range(0, 20, 2), *range(1, 20, 2))
TAB20_GREYS = (14, 15)
FIRST_COLOURS = [mpl.color_sequences["tab20"][index] for index in TAB20_STRONG_FIRST if index not in TAB20_GREYS]
"""Colours of the first classes: Matplotlib's tab20 without its greys, strong colours before pale ones."""
FIRST_HUE = 0.58
TONES = ((0.62, 0.88), (0.85, 0.62), (0.38, 0.95), (0.9, 0.85), (0.5, 0.55))
"""Saturation and value of further classes, in rotation."""
IGNORED_COLOUR = (0.93, 0.93, 0.93)
MAX_LEGEND_CLASSES = 30
"""The legend names the classes with the largest drawn area, at most this many."""
PICTURE_WIDTH = 3.0
"""In inches."""


@dataclass(frozen=True)
class Prediction:
    """A photo with its true and its predicted mask.

    Attributes:
        photo: uint8 [h, w, 3].
        true_ids: uint8 [H, W].
        predicted_ids: uint8 [H, W].
    """

    photo: np.ndarray
    true_ids: np.ndarray
    predicted_ids: np.ndarray


def palette(num_classes: int) -> np.ndarray:
    """The colour of each id, float [256, 3] in [0, 1]; pale grey for all ids that are no class."""
    colours = np.tile(np.array(IGNORED_COLOUR), (IGNORED + 1, 1))
    for class_id in range(num_classes):
        if class_id < len(FIRST_COLOURS):
            colours[class_id] = FIRST_COLOURS[class_id]
        else:
            colours[class_id] = colorsys.hsv_to_rgb(class_hue(class_id, FIRST_HUE), *TONES[class_id % len(TONES)])
    return colours


@text_as_it_is()
def draw_predictions(predictions: Sequence[Prediction], class_names: Sequence[str]) -> bytes:
    """Photo, truth and prediction side by side, one photo a row, above a legend of the classes in them; a PNG's bytes.

    Args:
        predictions: at least one.
        class_names: one for each class id.
    """
    colours = palette(len(class_names))
    legend = _legend(predictions, class_names, colours)
    legend_columns = max(1, min(5, 60 // max(len(str(patch.get_label())) for patch in legend)))
    legend_height = 0.22 * -(-len(legend) // legend_columns) + 0.2
    row_heights = [PICTURE_WIDTH * shown.true_ids.shape[0] / shown.true_ids.shape[1] for shown in predictions]
    height = sum(row_heights) + 0.06 * len(predictions) + legend_height + 0.3
    spacing = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(3 * PICTURE_WIDTH + 0.2, height), layout=spacing)
    grid = figure.subplots(len(predictions), 3, squeeze=False, gridspec_kw={"height_ratios": row_heights})
    for row, shown in zip(grid, predictions, strict=True):
        mask_height, mask_width = shown.true_ids.shape
        pictures = (shown.photo, colours[shown.true_ids], colours[shown.predicted_ids])
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest", extent=(0, mask_width, mask_height, 0))
            axes.set_axis_off()
    for axes, title in zip(grid[0], ("photo", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=11)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=9, handlelength=1.2
    )
    return png_bytes(figure, dpi=120)


def _legend(predictions: Sequence[Prediction], class_names: Sequence[str], colours: np.ndarray) -> list[Patch]:
    """Legend entries of the classes with the largest drawn area, in the order of their ids, and of the ignored id."""
    area = np.zeros(IGNORED + 1)
    for shown in predictions:
        for ids in (shown.true_ids, shown.predicted_ids):
            area += np.bincount(ids.ravel(), minlength=IGNORED + 1) / ids.size
    by_area = np.argsort(-area[: len(class_names)], kind="stable")
    largest = sorted(by_area[:MAX_LEGEND_CLASSES].tolist())
    patches = [
        Patch(color=tuple(colours[class_id]), label=label(class_names[class_id]))
        for class_id in largest
        if area[class_id]
    ]
    if area[IGNORED]:
        patches.append(Patch(facecolor=IGNORED_COLOUR, edgecolor="0.6", linewidth=0.5, label="ignored"))
    return patches
