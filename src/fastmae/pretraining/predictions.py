"""A picture of what a student predicts, beside its target."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.config import PretrainConfig
from fastmae.images.views import PixelScale, ViewDraws
from fastmae.pretraining.image_grid import displayable, image_grid_png
from fastmae.pretraining.plan import make_target, resolve_loss, resolve_norm
from fastmae.runs.load import load_student, options_of_run
from fastmae.student.encoder import visible_patches
from fastmae.student.student import AnyStudent
from fastmae.tokens import TokenStore
from fastmae.tokens.loader import StoreViews, ViewBatch

MASKED_GREY = 0.82
"""Grey level of the patches that the encoder does not see."""


@torch.inference_mode()
def predictions_png(run: Path, store: TokenStore, images: int, seed: int) -> bytes:
    """One row for each image: the view, its visible patches, the prediction and the target.

    Features are shown by the first three principal components of the target features. Predicted pixels (MAE) are shown
    as pixels, each patch with the mean and std of the original patch. Under the cosine loss, predictions get the length
    of their targets.

    Args:
        run: folder of a run that was trained on `store`. Of several stores, the first one's features are shown.
        store: the run's token store.
        images: number of rows.
        seed: seed of the masks.
    """
    description, student = load_student(run)
    config = options_of_run(run, description)
    patch_size = store.info.patch_size
    batch = _views_of_spread_images(store, config, images, seed)
    pixel_scale = PixelScale(*store.normalisation)
    pixels = pixel_scale(batch.pixels)
    target = make_target(config, [[store]], [resolve_norm(config, [store])])(batch, pixel_scale)
    visible = batch.ids_shuffle[:, : student.visible]
    predicted, target = (
        _in_order(shuffled, batch.ids_shuffle)
        for shuffled in (_predict_all_patches(student, pixels, batch.ids_shuffle, target), target)
    )
    if resolve_loss(config, store.info.teacher["kind"]) == "cosine":  # only directions are predicted
        predicted = F.normalize(predicted, dim=-1) * target.norm(dim=-1, keepdim=True)

    views = displayable(batch.pixels)
    columns = {"view": views, "visible": _with_masked_patches(views, visible, patch_size)}
    if config.target == "pixels":
        predicted_pixels = undo_norm_pix(predicted, batch.pixels / 255, patch_size)
        columns["predicted pixels"] = displayable(255 * predicted_pixels)
    else:
        features = "HOG" if config.target == "hog" else "features"
        target_title = f"stored {features}" if config.target == "tokens" else f"target {features}"
        grid = config.image_size // patch_size
        columns[f"predicted {features}"], columns[target_title] = _as_colours(predicted, target, grid)
    return image_grid_png({title: pictures.numpy() for title, pictures in columns.items()})


def _views_of_spread_images(store: TokenStore, config: PretrainConfig, images: int, seed: int) -> ViewBatch:
    """The central view of images at equal distances in the store, unflipped, with a mask as in training."""
    grid = config.image_size // store.info.patch_size
    draws = ViewDraws(grid, False, config.mask, visible_patches(grid**2, config.mask_ratio), seed)
    margin = (store.grid - grid) // 2
    indices = np.linspace(0, len(store) - 1, images).round().astype(int).tolist()
    views = [(index, replace(draws.draw(0, index, [store.grid]), row=margin, col=margin)) for index in indices]
    return StoreViews([[store]], draws).batch(views)


def _predict_all_patches(
    student: AnyStudent, pixels: torch.Tensor, ids_shuffle: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Predictions [B, N, C] in the order of `ids_shuffle`, which is that of the target, too.

    The decoder predicts the masked patches, the head of the encoder's last layer the visible ones. A student without
    such heads does not predict visible patches: the target stands in. A student without a decoder is shown the whole
    view.
    """
    channels = target.shape[2]
    if not student.has_decoder:
        prediction = student.predict(student.encode_tokens(pixels, ids_shuffle), ids_shuffle)
        assert prediction.layers is not None  # a student without a decoder has a head on its last layer
        return prediction.layers[-1][..., :channels]
    prediction = student(pixels, ids_shuffle)
    assert prediction.decoded is not None  # there is a decoder
    visible = target[:, : student.visible] if prediction.layers is None else prediction.layers[-1][..., :channels]
    masked = prediction.decoded[:, student.visible - student.patches :, :channels]
    return torch.cat([visible, masked], dim=1)


def _in_order(shuffled: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
    """Features [B, N, C] of the patches `ids_shuffle` [B, N] -> row by row."""
    return torch.empty_like(shuffled).scatter_(1, ids_shuffle.unsqueeze(-1).expand_as(shuffled), shuffled)


def _with_masked_patches(views: torch.Tensor, visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Views [B, H, H, 3] with the patches that are not in `visible` [B, V] in grey."""
    batch, height = views.shape[:2]
    grid = height // patch_size
    is_visible = torch.zeros(batch, grid * grid, dtype=torch.bool).scatter_(1, visible, True)
    per_pixel = is_visible.view(batch, grid, grid, 1).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return torch.where(per_pixel, views, torch.tensor(MASKED_GREY))


def undo_norm_pix(predicted: torch.Tensor, images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Norm-pix predictions [B, N, P * P * K] -> pixels [B, K, H, H], with the mean and std of `images`' patches."""
    batch, channels, height, _ = images.shape
    grid = height // patch_size
    tiles = images.reshape(batch, channels, grid, patch_size, grid, patch_size)
    patches = tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, -1)
    restored = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    tiles = restored.view(batch, grid, grid, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(batch, channels, height, height)


def _as_colours(predicted: torch.Tensor, target: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, N, C] -> colours [B, grid, grid, 3] in [0, 1], by the target's first three principal components."""
    flat = target.flatten(0, 1)
    mean = flat.mean(0)
    # Not torch.pca_lowrank: it is random, so each report would have other colours.
    components = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors[:, -3:].flip(1)
    low, high = torch.quantile((flat - mean) @ components, torch.tensor([0.02, 0.98]), dim=0)

    def colour(features: torch.Tensor) -> torch.Tensor:
        scaled = ((features - mean) @ components - low) / (high - low)
        return scaled.clamp(0, 1).view(len(features), grid, grid, 3)

    return colour(predicted), colour(target)
