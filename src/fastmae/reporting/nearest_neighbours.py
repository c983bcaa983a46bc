"""A picture of the images that an encoder finds most similar."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.pretraining.image_grid import displayable, image_grid_png
from fastmae.pretraining.knn_every import CentreViews
from fastmae.probes.embed import embed_images, embed_with_encoder
from fastmae.tokens import TokenStore

NEIGHBOURS = 6
"""Columns, the query itself included: it is its own nearest neighbour."""


@torch.no_grad()
def nearest_neighbours_png(encoder: Any, image_size: int, store: TokenStore, queries: int, gallery: int) -> bytes:
    """One row for each query: the central view, then the images nearest to it by the cosine of their mean patch tokens.

    Args:
        encoder: in evaluation mode, on the CPU.
        image_size: side of its images, in pixels.
        store: token store of the images.
        queries: number of rows.
        gallery: number of images to search, taken at equal distances in the store.
    """
    indices = np.unique(np.linspace(0, len(store) - 1, min(gallery, len(store))).round().astype(np.int64))
    views = CentreViews(store, indices, image_size)
    embed = embed_with_encoder(encoder, "mean", None, *store.normalisation)
    features = embed_images(views, embed, torch.device("cpu"), 64, 0, "neighbours")
    features = F.normalize(features, dim=1)
    rows = np.linspace(0, len(indices) - 1, queries + 2)[1:-1].round().astype(int)
    nearest = (features[rows] @ features.T).topk(min(NEIGHBOURS, len(indices)), dim=1).indices
    columns = {}
    for rank in range(nearest.shape[1]):
        pictures = torch.stack([views[int(index)] for index in nearest[:, rank]])
        columns["view" if rank == 0 else f"nearest {rank}"] = displayable(pictures).numpy()
    return image_grid_png(columns)
