"""A small student and a batch for it. Shapes: B views, N patches per view, V visible ones, C target channels."""

import pytest
import torch

from fastmae.student.encoder import build_encoder
from fastmae.student.student import Student

B, N, C = 3, 16, 10


@pytest.fixture(scope="session")
def make_student():
    """(timm's name, options) -> a student with three layers and the same weights each time; it sees 4 of 16 patches."""

    def make(name="vit_tiny_patch16_224", **options):
        torch.manual_seed(0)
        encoder = build_encoder(name, 64, 16, 48, 3, 3)
        return Student(encoder, C, decoder_width=32, decoder_heads=4, **options).eval()

    return make


@pytest.fixture(scope="session")
def batch():
    """Images [B, 3, 64, 64], target [B, N, C] and ids_shuffle [B, N]."""
    generator = torch.Generator().manual_seed(1)
    ids_shuffle = torch.stack([torch.randperm(N, generator=generator) for _ in range(B)])
    return torch.randn(B, 3, 64, 64, generator=generator), torch.randn(B, N, C, generator=generator), ids_shuffle
