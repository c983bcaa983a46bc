"""What a codec loses and how fast it is. Images stream by: only sums and mean features are kept, never the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.bench.timing import Turn, interleave, same_every_round
from fastmae.student.normalisation import patch_norm
from fastmae.tokens.codec import Codec

VIEWS, VIEW = 64, 14
"""Decoding is timed on 64 views of 14 x 14 patches (224 px, Sec. 4.1.1), or of whole grids if they are smaller."""


@dataclass
class Distortion:
    """How far decoded tokens are from the original ones, summed over all tokens added so far."""

    tokens: int = 0
    cosine_sum: float = 0.0
    squared_error_sum: float = 0.0
    squared_norm_sum: float = 0.0

    def add(self, tokens: torch.Tensor, decoded: torch.Tensor) -> None:
        """Add original and decoded tokens, both float32 [..., C]."""
        self.tokens += tokens[..., 0].numel()
        self.cosine_sum += float(F.cosine_similarity(tokens, decoded, dim=-1).double().sum())
        self.squared_error_sum += float((tokens - decoded).double().square().sum())
        self.squared_norm_sum += float(tokens.double().square().sum())

    @property
    def cosine(self) -> float:
        """Mean cosine similarity over the tokens."""
        return self.cosine_sum / self.tokens

    @property
    def relative_error(self) -> float:
        """||x - x'|| / ||x||, where x is the vector of all tokens and x' the decoded one."""
        return (self.squared_error_sum / self.squared_norm_sum) ** 0.5


@dataclass
class RoundTrip:
    """Tokens encoded and decoded by one codec.

    Attributes:
        codec: encodes and decodes.
        plain: distortion of the tokens.
        normed: distortion of the tokens after patch norm over the whole grid.
        features: mean decoded token of each image, one float32 [n, C] per batch.
    """

    codec: Codec
    plain: Distortion = field(default_factory=Distortion)
    normed: Distortion = field(default_factory=Distortion)
    features: list[torch.Tensor] = field(default_factory=list)

    def add(self, tokens: torch.Tensor, with_distortion: bool) -> None:
        """Encode and decode a batch of grids.

        Args:
            tokens: the teacher's tokens, float32 [n, grid, grid, C].
            with_distortion: add to the distortions, not to the features alone.
        """
        decoded = self.codec.decode_grids(*_encode(self.codec, tokens)).flatten(1, 2)
        self.features.append(decoded.mean(1))
        if with_distortion:
            grids = tokens.flatten(1, 2)
            self.plain.add(grids, decoded)
            self.normed.add(patch_norm(grids), patch_norm(decoded))


def time_codecs(
    codecs: Sequence[Codec], grids: torch.Tensor, device: torch.device, rounds: int
) -> list[tuple[list[float], list[float]]]:
    """Time all codecs side by side.

    Args:
        codecs: the contenders.
        grids: tokens to encode on the CPU, float32 [n, grid, grid, C].
        device: where `VIEWS` views cut from the grids are decoded.
        rounds: number of rounds that count.

    Returns:
        For each codec the seconds of encoding and the seconds of decoding, one per round.
    """
    size = view_size(grids)
    views = grids[torch.arange(VIEWS) % len(grids), :size, :size]
    turns: dict[tuple[str, str], Turn] = {}
    for codec in codecs:
        codes, means = (encoded.to(device) for encoded in _encode(codec, views))
        turns[codec.name, "encode"] = same_every_round(partial(codec.encode_grids, grids))
        turns[codec.name, "decode"] = same_every_round(partial(codec.decode_grids, codes, means), device)
    seconds = interleave(turns, rounds, "time the codecs")
    return [(seconds[codec.name, "encode"], seconds[codec.name, "decode"]) for codec in codecs]


def view_size(grids: torch.Tensor) -> int:
    """Patches along the side of the views that are decoded, for grids [n, grid, grid, C]."""
    return min(VIEW, grids.shape[1])


def _encode(codec: Codec, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, means = codec.encode_grids(tokens)
    return torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(means)
