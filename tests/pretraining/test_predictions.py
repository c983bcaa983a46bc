"""The picture of a student's predictions."""

from types import SimpleNamespace

import torch

from fastmae.pretraining.predictions import predictions_png, undo_norm_pix
from fastmae.student.targets import NormPix
from fastmae.tokens import TokenStore


def test_pixels_come_back_from_their_normalised_patches():
    images = torch.rand(2, 3, 32, 32)
    in_order = torch.arange(16).expand(2, -1)
    target = NormPix(8, 3)(SimpleNamespace(pixels=images, ids_shuffle=in_order), lambda pixels: pixels)
    assert torch.allclose(undo_norm_pix(target, images, 8), images, atol=1e-4)


def test_the_same_run_gives_the_same_picture_whatever_was_drawn_before(tiny_run, vit_store):
    store = TokenStore(vit_store)
    first = predictions_png(tiny_run, store, 2, seed=0)
    torch.rand(1)
    assert predictions_png(tiny_run, store, 2, seed=0) == first
