"""What a codec loses and how fast it is, over images that stream by: sums and mean features are kept, no tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.bench.timing import interleave, seconds_of
from fastmae.student.targets import patch_norm
from fastmae.tokens.codec import Codec

VIEWS, VIEW = 64, 14
"""Decoding is timed on a batch of 64 views of 14 x 14 patches (224 px, Sec. 4.1.1); of whole grids, where those are smaller."""


@dataclass
class Loss:
    """Sums over tokens: of their cosines with what was decoded, of the squared differences, of the squares."""

    tokens: int = 0
    cosines: float = 0.0
    differences: float = 0.0
    squares: float = 0.0

    def add(self, tokens: torch.Tensor, decoded: torch.Tensor) -> None:
        """Take in more, float32 [..., C] each."""
        self.tokens += tokens[..., 0].numel()
        self.cosines += float(F.cosine_similarity(tokens, decoded, dim=-1).double().sum())
        self.differences += float((tokens - decoded).double().square().sum())
        self.squares += float(tokens.double().square().sum())

    @property
    def cosine(self) -> float:
        """Mean over the tokens."""
        return self.cosines / self.tokens

    @property
    def relative_error(self) -> float:
        """||x - x'|| / ||x||, all tokens as one vector x."""
        return (self.differences / self.squares) ** 0.5


@dataclass
class Kept:
    """What one codec leaves of the tokens.

    Attributes:
        codec: with which they are encoded.
        plain: its loss.
        normed: its loss after patch norm over the whole grid.
        features: of each image the mean of its decoded tokens, float32 [n, C] a batch.
    """

    codec: Codec
    plain: Loss = field(default_factory=Loss)
    normed: Loss = field(default_factory=Loss)
    features: list[torch.Tensor] = field(default_factory=list)

    def add(self, tokens: torch.Tensor, with_loss: bool) -> None:
        """Encode and decode a batch of grids.

        Args:
            tokens: float32 [n, grid, grid, C], as the teacher gave them.
            with_loss: take in the loss, not just the features.
        """
        decoded = self.codec.decode_grids(*_kept(self.codec, tokens)).flatten(1, 2)
        self.features.append(decoded.mean(1))
        if with_loss:
            grids = tokens.flatten(1, 2)
            self.plain.add(grids, decoded)
            self.normed.add(patch_norm(grids), patch_norm(decoded))


def speeds(
    codecs: Sequence[Codec], grids: torch.Tensor, device: torch.device, rounds: int
) -> list[tuple[list[float], list[float]]]:
    """Of each codec the seconds of encoding and of decoding, a round each.

    Args:
        codecs: that take turns.
        grids: float32 [n, grid, grid, C]: what is encoded.
        device: where `VIEWS` views of them are decoded.
        rounds: to be timed.
    """
    size = view_size(grids)
    views = grids[torch.arange(VIEWS) % len(grids), :size, :size]
    works: dict[tuple[int, str], Callable[[int], float]] = {}
    for place, codec in enumerate(codecs):
        works[place, "encode"] = _encoding(codec, grids)
        works[place, "decode"] = _decoding(codec, *(kept.to(device) for kept in _kept(codec, views)))
    seconds = interleave(works, rounds)
    return [(seconds[place, "encode"], seconds[place, "decode"]) for place in range(len(codecs))]


def view_size(grids: torch.Tensor) -> int:
    """Patches along the side of the views that are decoded."""
    return min(VIEW, grids.shape[1])


def finished(result: torch.Tensor) -> torch.Tensor:
    """A result that is there, and not just asked for."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def _encoding(codec: Codec, grids: torch.Tensor) -> Callable[[int], float]:
    return lambda _: seconds_of(lambda: codec.encode_grids(grids))


def _decoding(codec: Codec, codes: torch.Tensor, means: torch.Tensor) -> Callable[[int], float]:
    return lambda _: seconds_of(lambda: finished(codec.decode_grids(codes, means)))


def _kept(codec: Codec, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, means = codec.encode_grids(tokens)
    return torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(means)
