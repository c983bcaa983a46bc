"""Tokens of images all over a list, for a codec to learn from and to be measured on."""

from dataclasses import dataclass

import torch

from fastmae.errors import InputError
from fastmae.offline.encoding import run_teacher
from fastmae.offline.middle_images import DecodedBatch, LoaderOptions, MiddleImages
from fastmae.runtime.progress import Progress
from fastmae.teachers import Teacher

SAMPLE_TOKENS = 1 << 16
"""Most tokens that a codec learns from: 256 for each of a codebook's 256 entries. k-means gains nothing from more."""


@dataclass(frozen=True)
class TokenSample:
    """Tokens drawn from images.

    Attributes:
        tokens: float32 [m, C].
        means: the mean token of each token's image, float32 [m, C].
        images: number of the image that each token comes from, int64 [m]: 0, 1, ... as they were decoded.
        grids: all tokens of every `grid_every`-th of these images, beginning with image 0, float32 [k, grid, grid, C].
        grid_every: as above; 0 for no grids.
    """

    tokens: torch.Tensor
    means: torch.Tensor
    images: torch.Tensor
    grids: torch.Tensor
    grid_every: int


def sample_tokens(
    images: MiddleImages,
    teacher: Teacher,
    options: LoaderOptions,
    num_images: int,
    seed: int,
    progress: Progress,
    grid_every: int = 0,
) -> TokenSample:
    """Draw tokens from images all over the list. The same list and seed give the same tokens.

    Args:
        images: the images.
        teacher: on its device.
        options: how images reach the teacher.
        num_images: number of images to take, about.
        seed: of the draw.
        progress: counts images.
        grid_every: keep all tokens of every so many images.

    Raises:
        InputError: none of the images can be decoded.
    """
    ranges = images.evenly_spaced(num_images, options.batch_size)
    tokens_per_image = -(-SAMPLE_TOKENS // sum(len(positions) for _, positions in ranges))
    generator = torch.Generator().manual_seed(seed)
    samples: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    for batch in images.load(ranges, options.workers):
        images.check_strict(batch, options.strict)
        for grid in tokens_on_cpu(teacher, batch):
            if grid_every and len(samples) % grid_every == 0:
                grids.append(grid.clone())
            flat = grid.flatten(0, 1)
            drawn = flat[torch.randperm(len(flat), generator=generator)[:tokens_per_image]]
            samples.append(torch.stack([drawn, flat.mean(0).expand_as(drawn)]))
        progress.advance(len(batch.images))
    if not samples:
        raise InputError(f"{images.origin}: none of the {num_images} images tried could be decoded")
    tokens, means = torch.cat(samples, dim=1)
    numbers = torch.arange(len(samples)).repeat_interleave(torch.tensor([sample.shape[1] for sample in samples]))
    return TokenSample(tokens, means, numbers, torch.stack(grids) if grids else torch.empty(0), grid_every)


def tokens_on_cpu(teacher: Teacher, batch: DecodedBatch) -> torch.Tensor:
    """The teacher's tokens of a batch, computed on its device: float32 [n, grid, grid, C] on the CPU."""
    return run_teacher(teacher, batch.pixels.to(teacher.mean.device)).cpu()
