"""What the student predicts: g(I_full) of Eq. 1 for a batch of views.

Stored tokens, a teacher that runs online, pixels and HOG share one interface, `Target`.

Shapes: B views, N patches per view, C target channels, K image channels, G patches along a middle image's side.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from fastmae.errors import InputError
from fastmae.student.hog import HOG_BINS, HOG_CELL, hog
from fastmae.student.normalisation import EPSILON, Normalisation
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec
from fastmae.tokens.loader import ViewBatch


class Target(Protocol):
    """g of Eq. 1, for a batch of views.

    Attributes:
        dims: channels of each teacher's part of the target; their sum is C.
        reads_tokens: whether the batches must hold stored tokens.
        reads_middle: whether the batches must hold whole middle images.
    """

    dims: tuple[int, ...]
    reads_tokens: bool
    reads_middle: bool

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """The target of all patches, float32 [B, N, C].

        Args:
            batch: the views.
            images: float32 [B, K, H, W], the views' pixels, normalised.
        """
        ...


class StoredTokens:
    """The look-up (Eq. 2): the tokens that were read with the views, one teacher's beside the other's.

    The batch holds them as the codec stores them; they are decoded here, on the device.

    Args:
        codecs: codec of each store.
        norms: guidance normalisation of each store's tokens.
    """

    reads_tokens, reads_middle = True, False

    def __init__(self, codecs: Sequence[Codec], norms: Sequence[Normalisation]):
        self.dims = tuple(codec.token_dim for codec in codecs)
        self.codecs, self.norms = codecs, norms

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """See `Target`."""
        stores = zip(self.codecs, self.norms, batch.tokens, batch.means, strict=True)
        return torch.cat([norm(codec.decode_grids(codes, means)) for codec, norm, codes, means in stores], dim=-1)


class OnlineTokens:
    """The same target without stored tokens: at every step the teachers run on the middle images (Fig. 3a, online).

    Args:
        teachers: on the device of the batches.
        norms: guidance normalisation of each teacher's features.
        size: number of patches along a view's side.
        exact_flips: run the teacher on the mirrored image of a flipped view, instead of mirroring its token grid.
    """

    reads_tokens, reads_middle = False, True

    def __init__(self, teachers: Sequence[Teacher], norms: Sequence[Normalisation], size: int, exact_flips: bool):
        self.dims = tuple(teacher.token_dim for teacher in teachers)
        self.teachers, self.norms, self.size, self.exact_flips = teachers, norms, size, exact_flips

    def to(self, device: torch.device) -> None:
        """Move the teachers to a device."""
        for teacher in self.teachers:
            teacher.to(device)

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """See `Target`."""
        assert batch.middle is not None
        middle, crop = batch.middle, batch.crop
        if self.exact_flips:
            # Mirror the images of flipped views; each view's first column is then counted from the other side.
            row, col, flip = crop.unbind(1)
            flipped = flip.bool()
            middle = torch.where(flipped[:, None, None, None], middle.flip(-1), middle)
            mirrored_col = self.teachers[0].grid - col - self.size
            crop = torch.stack([row, torch.where(flipped, mirrored_col, col), torch.zeros_like(flip)], dim=1)
        views = [cut_views(teacher(middle), crop, self.size) for teacher in self.teachers]
        return torch.cat([norm(tokens) for norm, tokens in zip(self.norms, views, strict=True)], dim=-1)


class NormPix:
    """MAE's normalised pixels.

    Args:
        patch_size: side of a patch, in pixels.
        channels: K.
    """

    reads_tokens, reads_middle = False, False

    def __init__(self, patch_size: int, channels: int = 3):
        self.patch_size = patch_size
        self.dims: tuple[int, ...] = (channels * patch_size**2,)

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """See `Target`."""
        return norm_pix(images, self.patch_size)


class Hog:
    """MaskFeat's histograms of oriented gradients.

    Args:
        patch_size: side of a patch, in pixels.
        norm: guidance normalisation.
        channels: K.

    Raises:
        InputError: the patches can't be divided into cells.
    """

    reads_tokens, reads_middle = False, False

    def __init__(self, patch_size: int, norm: Normalisation, channels: int = 3):
        if patch_size % HOG_CELL:
            raise InputError(
                f"--target hog: patches of {patch_size} px are not a multiple of HOG's cells of {HOG_CELL} px; "
                f"use --target pixels"
            )
        self.patch_size, self.norm = patch_size, norm
        self.dims: tuple[int, ...] = (channels * HOG_BINS * (patch_size // HOG_CELL) ** 2,)

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """See `Target`."""
        return self.norm(hog(images, self.patch_size))


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches: [B, K, H, W] -> [B, N, P * P * K].

    Patches come row by row, and so do the pixels of a patch, colours last: MAE's order.
    """
    batch, channels, height, width = pixels.shape
    rows, cols = height // patch_size, width // patch_size
    patches = pixels.reshape(batch, channels, rows, patch_size, cols, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, rows * cols, patch_size**2 * channels)


def norm_pix(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """MAE's target: the patches of the image, each with zero mean and unit (unbiased) variance.

    Args:
        pixels: float32 [B, K, H, W], as the student sees them.
        patch_size: P, the side of a patch in pixels.

    Returns:
        float32 [B, N, P * P * K].
    """
    patches = patchify(pixels, patch_size)
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True)  # unbiased, as in MAE
    return (patches - mean) * torch.rsqrt(variance + EPSILON)


def cut_views(grids: torch.Tensor, crop: torch.Tensor, size: int) -> torch.Tensor:
    """Cut views out of whole feature grids and mirror the flipped ones, as the reader does on disk.

    Args:
        grids: [B, G, G, C].
        crop: int64 [B, 3], row and column of the view's first patch, and 1 for a flipped view.
        size: number of patches along a view's side.

    Returns:
        [B, size * size, C].
    """
    row, col, flip = crop.unbind(1)
    steps = torch.arange(size, device=grids.device)
    rows = row[:, None] + steps  # [B, size]
    cols = col[:, None] + torch.where(flip[:, None].bool(), size - 1 - steps, steps)
    index = torch.arange(len(grids), device=grids.device)[:, None, None]
    return grids[index, rows[:, :, None], cols[:, None, :]].flatten(1, 2)
