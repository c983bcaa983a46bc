"""Pictures in rows and columns, as a PNG."""

import io

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

mpl.use("agg")


def displayable(pixels: torch.Tensor) -> torch.Tensor:
    """[B, K, H, W] with values to 255 -> [B, H, W, 3] in [0, 1]: grey, RGB, or the first three of more channels."""
    channels = [0, 0, 0] if pixels.shape[1] < 3 else [0, 1, 2]
    return (pixels[:, channels] / 255).clamp(0, 1).permute(0, 2, 3, 1)


def image_grid_png(columns: dict[str, np.ndarray]) -> bytes:
    """A grid with one column for each name.

    Args:
        columns: title -> pictures [rows, H, W, 3] in [0, 1], one for each row.
    """
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.7 * len(columns), 1.65 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for col, (title, pictures) in enumerate(columns.items()):
        grid[0, col].set_title(title, fontsize=9)
        for axes, picture in zip(grid[:, col], pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()
