"""What a student predicts, beside what the store holds, as colours; and curves. Each function gives a PNG's bytes."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from fastmae.config import PretrainConfig
from fastmae.images.views import ViewDraws, normalise
from fastmae.model import visible_patches
from fastmae.plan import make_target, resolve_norm
from fastmae.runs import load_student, options_of_run
from fastmae.tokens import TokenStore
from fastmae.tokens.loader import StoreViews, ViewBatch

mpl.use("agg")

HIDDEN = 0.82
"""Grey level of a patch that the encoder did not see."""


@torch.inference_mode()
def predictions(run: Path, store: TokenStore, images: int, seed: int) -> bytes:
    """A row an image: the view, what was visible of it, the predicted features, and the stored ones.

    Features are shown by their first three principal components, fitted on the stored ones; where a patch was visible, the
    prediction is that of the encoder's last layer, else the decoder's.

    Args:
        run: a run with all layers supervised, on `store`.
        store: its token store.
        images: how many rows.
        seed: of the choice of images and masks.
    """
    description, student = load_student(run)
    config = replace(options_of_run(run, description), stores=(str(store.folder),))
    target_of = make_target(config, [[store]], [resolve_norm(config, [store])])
    batch = _spread_views(store, config, images, seed)
    pixels = normalise(batch.pixels, *store.normalisation)
    target = target_of(batch, pixels)
    prediction = student(pixels, batch.order)
    in_order = torch.cat([prediction.layers[-1], prediction.decoded[:, -(student.patches - student.visible) :]], dim=1)
    predicted = torch.zeros_like(target).scatter_(1, batch.order.unsqueeze(-1).expand_as(target), in_order)
    size = config.image_size // store.info.patch_size
    patch = store.info.patch_size
    seen = torch.zeros(images, size * size, dtype=torch.bool).scatter_(1, batch.order[:, : student.visible], True)
    seen_pixels = seen.view(images, size, 1, size, 1).expand(-1, -1, patch, -1, patch).reshape(images, 1, size * patch, size * patch)
    shown = batch.pixels[:, [0, 0, 0] if batch.pixels.shape[1] < 3 else [0, 1, 2]] / 255  # grey, RGB, or the first three channels
    columns = {
        "view": shown.permute(0, 2, 3, 1),
        "visible": torch.where(seen_pixels, shown, torch.tensor(HIDDEN)).permute(0, 2, 3, 1),
        "predicted features": None,
        "stored features": None,
    }
    columns["predicted features"], columns["stored features"] = _as_colours(predicted, target, size)
    return _grid_of_pictures({name: value.numpy() for name, value in columns.items() if value is not None})


def curves(series: dict[str, list[dict[str, Any]]], x: str, y: str, x_label: str, y_label: str) -> bytes:
    """Lines over a common axis, one a run.

    Args:
        series: name -> log entries.
        x: key of the horizontal values.
        y: key of the vertical values.
        x_label: of the axis.
        y_label: the same.
    """
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, entries in series.items():
        axes.plot([entry[x] for entry in entries], [entry[y] for entry in entries], label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _png(figure)


def bars(values: dict[str, float], x_label: str) -> bytes:
    """Horizontal bars with their values, the first on top."""
    figure = Figure(figsize=(6.4, 0.5 * len(values) + 0.8), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(values), list(values.values()), height=0.6)
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=x_label, xlim=(0, max(100.0, *values.values()) * 1.08))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _spread_views(store: TokenStore, config: PretrainConfig, images: int, seed: int) -> ViewBatch:
    """Views of images from all over the store, unflipped."""
    size = config.image_size // store.info.patch_size
    draws = ViewDraws(size, False, config.mask, visible_patches(size**2, config.mask_ratio), seed)
    views = StoreViews([[store]], draws)
    centre = (store.grid - size) // 2
    chosen = np.linspace(0, len(store) - 1, images).round().astype(int).tolist()
    return views.batch([(index, replace(draws.draw(0, index, [store.grid]), row=centre, col=centre)) for index in chosen])


def _as_colours(predicted: torch.Tensor, stored: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N, C] each -> [B, size, size, 3] each in [0, 1], by the stored features' first three principal components."""
    flat = stored.flatten(0, 1)
    centre = flat.mean(0)
    _, _, components = torch.pca_lowrank(flat - centre, q=3, center=False)
    low, high = torch.quantile((flat - centre) @ components, torch.tensor([0.02, 0.98]), dim=0)
    coloured = [(((features - centre) @ components - low) / (high - low)).clamp(0, 1) for features in (predicted, stored)]
    return tuple(c.view(len(c), size, size, 3) for c in coloured)


def _grid_of_pictures(columns: dict[str, np.ndarray]) -> bytes:
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.7 * len(columns), 1.65 * rows + 0.3), layout="constrained")
    for col, (name, pictures) in enumerate(columns.items()):
        for row in range(rows):
            axes = figure.add_subplot(rows, len(columns), row * len(columns) + col + 1)
            axes.imshow(pictures[row], interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(name, fontsize=9)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()
