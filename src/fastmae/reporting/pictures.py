"""What a student predicts, beside what the store holds, as colours. A PNG's bytes."""

import io
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from fastmae.config import PretrainConfig
from fastmae.images.views import ViewDraws, normalise
from fastmae.pretraining.plan import make_target, resolve_norm
from fastmae.runs.load import load_student, options_of_run
from fastmae.student.encoder import visible_patches
from fastmae.tokens import TokenStore
from fastmae.tokens.loader import StoreViews, ViewBatch

mpl.use("agg")

HIDDEN = 0.82
"""Grey level of a patch that the encoder did not see."""


@torch.inference_mode()
def predictions(run: Path, store: TokenStore, images: int, seed: int) -> bytes:
    """A row an image: the view, what was visible of it, the predicted features, and the stored ones.

    Features are shown by their first three principal components, fitted on the stored ones; where a patch was visible, the
    prediction is that of the encoder's last layer where it has one, else what is stored. MAE's pixels are shown as pixels, each patch
    given back its own mean and deviation.

    Args:
        run: on `store`.
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
    prediction = student(pixels, batch.ids_shuffle)
    visible = batch.ids_shuffle[:, : student.visible]
    known = (
        prediction.layers[-1]
        if prediction.layers
        else target.gather(1, visible.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
    )
    in_order = torch.cat([known, prediction.decoded[:, -(student.patches - student.visible) :]], dim=1)
    predicted = torch.zeros_like(target).scatter_(1, batch.ids_shuffle.unsqueeze(-1).expand_as(target), in_order)
    shown = as_shown(batch.pixels)
    columns = {"view": shown, "visible": _where_seen(shown, visible, store.info.patch_size)}
    if config.target == "pixels":
        columns["predicted pixels"] = as_shown(255 * _as_pixels(predicted, batch.pixels / 255, store.info.patch_size))
    else:
        what = "features" if config.target != "hog" else "HOG"
        colours = as_colours(predicted, target, config.image_size // store.info.patch_size)
        columns |= dict(
            zip(
                (f"predicted {what}", f"{'stored' if config.target == 'tokens' else 'wanted'} {what}"),
                colours,
                strict=True,
            )
        )
    return grid_of_pictures({name: value.numpy() for name, value in columns.items()})


def as_shown(pixels: torch.Tensor) -> torch.Tensor:
    """[B, K, H, W] of values to 255 -> [B, H, W, 3] in [0, 1]: grey, RGB, or the first three channels."""
    return (pixels[:, [0, 0, 0] if pixels.shape[1] < 3 else [0, 1, 2]] / 255).clamp(0, 1).permute(0, 2, 3, 1)


def _where_seen(shown: torch.Tensor, visible: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, H, W, 3] with the patches that are not in `visible` [B, V] blanked."""
    batch, height = shown.shape[:2]
    size = height // patch
    seen = torch.zeros(batch, size * size, dtype=torch.bool).scatter_(1, visible, True).view(batch, size, 1, size, 1)
    return torch.where(
        seen.expand(-1, -1, patch, -1, patch).reshape(batch, height, height, 1), shown, torch.tensor(HIDDEN)
    )


def _as_pixels(predicted: torch.Tensor, images: torch.Tensor, patch: int) -> torch.Tensor:
    """Norm-pix predictions [B, N, K * P * P] -> pixels [B, K, H, W], by the mean and deviation that each patch of `images` has."""
    batch, channels, height, _ = images.shape
    size = height // patch
    rows = (
        images.unflatten(2, (size, patch))
        .unflatten(4, (size, patch))
        .permute(0, 2, 4, 3, 5, 1)
        .flatten(1, 2)
        .flatten(2)
    )
    restored = predicted * (rows.var(-1, keepdim=True) + 1e-6).sqrt() + rows.mean(-1, keepdim=True)
    tiles = restored.view(batch, size, size, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(batch, channels, height, height)


def _spread_views(store: TokenStore, config: PretrainConfig, images: int, seed: int) -> ViewBatch:
    """Views of images from all over the store, unflipped."""
    size = config.image_size // store.info.patch_size
    draws = ViewDraws(size, False, config.mask, visible_patches(size**2, config.mask_ratio), seed)
    views = StoreViews([[store]], draws)
    centre = (store.grid - size) // 2
    chosen = np.linspace(0, len(store) - 1, images).round().astype(int).tolist()
    return views.batch(
        [(index, replace(draws.draw(0, index, [store.grid]), row=centre, col=centre)) for index in chosen]
    )


def as_colours(predicted: torch.Tensor, stored: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as colours: [B, N, C] each -> [B, size, size, 3] each in [0, 1], by the stored ones' first three principal components."""
    flat = stored.flatten(0, 1)
    centre = flat.mean(0)
    _, _, components = torch.pca_lowrank(flat - centre, q=3, center=False)
    low, high = torch.quantile((flat - centre) @ components, torch.tensor([0.02, 0.98]), dim=0)
    coloured = [
        (((features - centre) @ components - low) / (high - low)).clamp(0, 1) for features in (predicted, stored)
    ]
    return tuple(c.view(len(c), size, size, 3) for c in coloured)


def grid_of_pictures(columns: dict[str, np.ndarray]) -> bytes:
    """A column a name, a row a picture: each [rows, H, W, 3] in [0, 1]. An empty name draws no title."""
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
