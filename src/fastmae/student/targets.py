"""What the student predicts: g(I_full) of Eq. 1 for a batch of views, and guidance normalisation (Sec. 4.2.2).

Stored tokens, a teacher run online, pixels and HOG have one interface (`Target`); the student does not know which it has.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from fastmae.errors import InputError
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec
from fastmae.tokens.loader import ViewBatch

Normalisation = Callable[[torch.Tensor], torch.Tensor]
"""Features [B, N, C] -> float32 [B, N, C]."""

EPSILON = 1e-6
"""Added to variances. MAE's for norm-pix; TEC publishes none for its patch norm, so the same."""


HOG_BINS, HOG_CELL = 9, 8
"""Orientations, and pixels along a cell's side (MaskFeat's)."""


class Target(Protocol):
    """g of Eq. 1, of a batch of views.

    Attributes:
        dims: channels of each teacher's part; the whole target has their sum, C.
        reads_tokens: whether batches must bring stored tokens.
        reads_middle: whether batches must bring whole middle images.
    """

    dims: tuple[int, ...]
    reads_tokens: bool
    reads_middle: bool

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, N, C] of the batch's views; `images` are its pixels, normalised, float32 [B, K, H, W]."""
        ...


class StoredTokens:
    """The look-up (Eq. 2): the tokens that came with the views, one teacher's beside the other's.

    They travel as the codec has them and are decoded here, on the device.

    Args:
        codecs: of each store.
        norms: guidance normalisation of each.
    """

    reads_tokens, reads_middle = True, False

    def __init__(self, codecs: Sequence[Codec], norms: Sequence[Normalisation]):
        self.dims = tuple(codec.token_dim for codec in codecs)
        self.codecs, self.norms = codecs, norms

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """As `Target`."""
        stored = zip(self.codecs, self.norms, batch.tokens, batch.means, strict=True)
        return torch.cat([norm(codec.decode_grids(codes, means)) for codec, norm, codes, means in stored], dim=-1)


class OnlineTokens:
    """The same function without a store's tokens: the teachers run at every step on the whole middle images (Fig. 3a online).

    Args:
        teachers: on the device of the batches.
        norms: guidance normalisation of each.
        size: patches along a view's side.
        exact_flips: of a flipped view, run the teacher on the mirrored image, instead of mirroring the grid.
    """

    reads_tokens, reads_middle = False, True

    def __init__(self, teachers: Sequence[Teacher], norms: Sequence[Normalisation], size: int, exact_flips: bool):
        self.dims = tuple(teacher.token_dim for teacher in teachers)
        self.teachers, self.norms, self.size, self.exact_flips = teachers, norms, size, exact_flips

    def to(self, device: torch.device) -> None:
        """Move the teachers."""
        for teacher in self.teachers:
            teacher.to(device)

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """As `Target`."""
        assert batch.middle is not None
        middle, place = batch.middle, batch.crop
        if self.exact_flips:
            row, col, flipped = place.unbind(1)
            mirrored = flipped[:, None, None, None].bool()
            middle = torch.where(mirrored, middle.flip(-1), middle)
            grid = self.teachers[0].grid
            place = torch.stack(
                [row, torch.where(flipped.bool(), grid - col - self.size, col), torch.zeros_like(flipped)], dim=1
            )
        views = [cut_views(teacher(middle), place, self.size) for teacher in self.teachers]
        return torch.cat([norm(tokens) for norm, tokens in zip(self.norms, views, strict=True)], dim=-1)


class NormPix:
    """MAE's normalised pixels."""

    reads_tokens, reads_middle = False, False

    def __init__(self, patch_size: int, channels: int = 3):
        self.patch_size = patch_size
        self.dims: tuple[int, ...] = (channels * patch_size**2,)

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """As `Target`."""
        return norm_pix(images, self.patch_size)


class Hog:
    """MaskFeat's histograms of oriented gradients.

    Args:
        patch_size: in pixels.
        norm: guidance normalisation.
        channels: of the images.

    Raises:
        InputError: patches that are not made of whole cells.
    """

    reads_tokens, reads_middle = False, False

    def __init__(self, patch_size: int, norm: Normalisation, channels: int = 3):
        if patch_size % HOG_CELL:
            raise InputError(
                f"--target hog: patches of {patch_size} px are not made of whole cells of {HOG_CELL} px; take --target pixels"
            )
        self.patch_size, self.norm = patch_size, norm
        self.dims: tuple[int, ...] = (channels * HOG_BINS * (patch_size // HOG_CELL) ** 2,)

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        """As `Target`."""
        return self.norm(hog(images, self.patch_size))


def patch_norm(features: torch.Tensor) -> torch.Tensor:
    """For each view and channel: zero mean and unit variance over the N patches (TEC). features: [B, N, C]."""
    return _standardise(features, dim=1)


def channel_norm(features: torch.Tensor) -> torch.Tensor:
    """For each patch: zero mean and unit variance over the C channels (as MAE's norm-pix). features: [B, N, C]."""
    return _standardise(features, dim=2)


def store_norm(mean: torch.Tensor, std: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Each channel by its mean and deviation over the whole store: keeps what tells one image from another.

    On a CNN's last map patch norm would remove just that: the image's own mean, where its category lies.

    Args:
        mean: [C].
        std: [C].
    """
    scale = torch.rsqrt(std.square() + EPSILON)
    return lambda features: (features - mean.to(features.device)) * scale.to(features.device)


def unchanged(features: torch.Tensor) -> torch.Tensor:
    """No guidance normalisation."""
    return features


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, K, H, W] -> [B, N, P * P * K]: patches row by row; within one, pixels row by row, colours last (MAE's order)."""
    batch, channels, height, width = pixels.shape
    rows, cols = height // patch_size, width // patch_size
    cut = pixels.reshape(batch, channels, rows, patch_size, cols, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, patch_size**2 * channels)


def norm_pix(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """MAE's target: each patch of the normalised image with zero mean and unit (unbiased) variance.

    Args:
        pixels: float32 [B, K, H, W], as the student sees them.
        patch_size: side of a patch, in pixels.

    Returns:
        float32 [B, N, P * P * K].
    """
    patches = patchify(pixels, patch_size)
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True)  # unbiased, as MAE has it
    return (patches - mean) * torch.rsqrt(variance + EPSILON)


def hog(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Histograms of oriented gradients (Dalal and Triggs 2005) as MaskFeat predicts them.

    Of each colour by itself: central differences (rims reflected), unsigned orientation in 9 bins over 180 degrees, each
    pixel's magnitude into one bin, sums over cells of 8 x 8 pixels, each cell's histogram to unit L2 norm. Own code: the kept
    libraries that have HOG (scikit-image, OpenCV) take one NumPy image at a time, not a batch on a device.

    Args:
        pixels: float [B, K, H, W].
        patch_size: side of a patch, in pixels; a multiple of 8.

    Returns:
        float32 [B, N, 9 K (P / 8)^2]: a patch's cells row by row; within one, colour by colour.
    """
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    angle = torch.atan2(down, across) / math.pi  # in half turns
    bins = (angle * HOG_BINS).floor().long() % HOG_BINS
    votes = torch.zeros(*bins.shape[:2], HOG_BINS, *bins.shape[2:], device=pixels.device)
    votes.scatter_(2, bins.unsqueeze(2), torch.hypot(across, down).unsqueeze(2))
    cells = F.avg_pool2d(votes.flatten(1, 2), HOG_CELL).unflatten(1, (pixels.shape[1], HOG_BINS))
    cells = F.normalize(cells, dim=2).flatten(1, 2)  # [B, 9 K, H / 8, W / 8]
    side = patch_size // HOG_CELL
    batch, channels, height, width = cells.shape
    cut = cells.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, (height // side) * (width // side), side**2 * channels)


def cut_views(grids: torch.Tensor, place: torch.Tensor, size: int) -> torch.Tensor:
    """Cut views out of whole grids of features, flipped ones mirrored: what the reader does on the disk.

    Args:
        grids: [B, G, G, C].
        place: int64 [B, 3]: row and column of the view's first patch, and whether it is flipped.
        size: patches along a view's side.

    Returns:
        [B, size * size, C].
    """
    steps = torch.arange(size, device=grids.device)
    row, col, flipped = place.unbind(1)
    rows = row[:, None] + steps
    cols = col[:, None] + torch.where(flipped[:, None].bool(), size - 1 - steps, steps)
    images = torch.arange(len(grids), device=grids.device)[:, None, None]
    return grids[images, rows[:, :, None], cols[:, None, :]].flatten(1, 2)


def _standardise(features: torch.Tensor, dim: int) -> torch.Tensor:
    centred = features - features.mean(dim, keepdim=True)  # on a CPU a fifth of torch.var_mean's time
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + EPSILON)
