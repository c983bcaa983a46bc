"""What the student predicts: g(I_full) of Eq. 1 for a batch of views.

Stored tokens, a teacher that runs online, pixels and HOG share one interface, `Target`.

Shapes: B views, N patches per view, C target channels, K image channels, G patches along a middle image's side.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from fastmae.errors import InputError
from fastmae.images.views import PixelScale
from fastmae.student.encoder import cut_patches, gather_patches
from fastmae.student.hog import HOG_BINS, HOG_CELL, hog
from fastmae.student.normalisation import EPSILON, Normalisation, StoreNorm
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

    def to(self, device: torch.device) -> None:
        """Put all that the target computes with on the device of the batches."""
        ...

    def __call__(self, batch: ViewBatch, pixel_scale: PixelScale) -> torch.Tensor:
        """The target of all patches in the order of `ids_shuffle`, float32 [B, N, C].

        So the student's predictions are compared with slices of it, and nothing is gathered in fp32.

        Args:
            batch: the views.
            pixel_scale: normalises the views' pixels, where the target is made from them.
        """
        ...


class StoredTokens:
    """The look-up (Eq. 2): the tokens that were read with the views, one teacher's beside the other's.

    The batch holds them as the codec stores them; they are decoded here, on the device. fp16's need no decoding.

    Args:
        codecs: codec of each store.
        norms: guidance normalisation of each store's tokens.
    """

    reads_tokens, reads_middle = True, False

    def __init__(self, codecs: Sequence[Codec], norms: Sequence[Normalisation]):
        self.dims = tuple(codec.token_dim for codec in codecs)
        self.codecs, self.norms = codecs, norms

    def to(self, device: torch.device) -> None:
        """See `Target`."""
        for codec in self.codecs:
            codec.quantiser.on(device)
        _move(self.norms, device)

    def __call__(self, batch: ViewBatch, pixel_scale: PixelScale) -> torch.Tensor:
        """See `Target`."""
        stores = zip(self.codecs, self.norms, batch.tokens, batch.means, strict=True)
        shuffled = batch.ids_shuffle
        return _joined(
            [norm(codec.read_grids(gather_patches(codes, shuffled), means)) for codec, norm, codes, means in stores]
        )


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
        """See `Target`."""
        for teacher in self.teachers:
            teacher.to(device)
        _move(self.norms, device)

    def __call__(self, batch: ViewBatch, pixel_scale: PixelScale) -> torch.Tensor:
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
        views = [cut_views(teacher(middle), crop, self.size, batch.ids_shuffle) for teacher in self.teachers]
        return _joined([norm(tokens) for norm, tokens in zip(self.norms, views, strict=True)])


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

    def to(self, device: torch.device) -> None:
        """See `Target`: there is nothing but the batch."""

    def __call__(self, batch: ViewBatch, pixel_scale: PixelScale) -> torch.Tensor:
        """See `Target`."""
        return norm_pix(pixel_scale(cut_patches(batch.pixels, self.patch_size, batch.ids_shuffle)))


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

    def to(self, device: torch.device) -> None:
        """See `Target`: HOG's normalisations have no constants."""

    def __call__(self, batch: ViewBatch, pixel_scale: PixelScale) -> torch.Tensor:
        """See `Target`."""
        return gather_patches(self.norm(hog(pixel_scale(batch.pixels), self.patch_size)), batch.ids_shuffle)


def _move(norms: Sequence[Normalisation], device: torch.device) -> None:
    for norm in norms:
        if isinstance(norm, StoreNorm):
            norm.to(device)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The teachers' parts of the target, side by side; one teacher's is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def norm_pix(patches: torch.Tensor) -> torch.Tensor:
    """MAE's target: the patches of an image, each with zero mean and unit (unbiased) variance.

    Args:
        patches: float32 [B, N, K, P, P], as the student sees them.

    Returns:
        float32 [B, N, P * P * K]: the pixels of a patch row by row, colours last, which is MAE's order.
    """
    values = patches.permute(0, 1, 3, 4, 2).flatten(2)
    mean = values.mean(-1, keepdim=True)
    variance = values.var(-1, keepdim=True)  # unbiased, as in MAE
    return (values - mean) * torch.rsqrt(variance + EPSILON)


def cut_views(grids: torch.Tensor, crop: torch.Tensor, size: int, ids_shuffle: torch.Tensor) -> torch.Tensor:
    """Cut views out of whole feature grids and mirror the flipped ones, as the reader does on disk.

    Args:
        grids: [B, G, G, C].
        crop: int64 [B, 3], row and column of the view's first patch, and 1 for a flipped view.
        size: number of patches along a view's side.
        ids_shuffle: int64 [B, N], patches of the view.

    Returns:
        [B, N, C], the features of these patches in this order.
    """
    row, col, flip = crop.unsqueeze(2).unbind(1)  # [B, 1] each
    in_view = ids_shuffle % size
    rows = row + ids_shuffle // size
    cols = col + torch.where(flip.bool(), size - 1 - in_view, in_view)
    return grids[torch.arange(len(grids), device=grids.device)[:, None], rows, cols]
