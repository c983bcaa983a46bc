"""Tokens of whole images as a shard stores them, and their sums. Computed on any device, without waiting for it."""

from dataclasses import dataclass

import torch

from fastmae.tokens.codec import Codec, peak_of


@dataclass(frozen=True)
class EncodedImages:
    """Encoded tokens of n images, on the device that encoded them.

    Attributes:
        codes: [n, grid, grid, C'] of the codec's dtype.
        means: what the codec stores of each image's mean token, float16 [n, C] or [n, 0].
        sums: sum and sum of squares of each channel of the tokens before encoding, [2, C]; float64, or float32 on a
            device without float64.
        peak: largest magnitude among the tokens before encoding, float32 []; NaN if one of them is.
    """

    codes: torch.Tensor
    means: torch.Tensor
    sums: torch.Tensor
    peak: torch.Tensor

    @classmethod
    def of(cls, codec: Codec, tokens: torch.Tensor) -> "EncodedImages":
        """Encode tokens, float32 [n, grid, grid, C], on their device. `check` then says whether they could be."""
        codes, means = codec.encode_unchecked(tokens)
        return cls(codes, means, channel_sums(tokens), peak_of(tokens))

    def check(self, codec: Codec) -> None:
        """Check that the codec can hold the tokens. On a device, this waits for it.

        Raises:
            InputError: tokens that are not finite, or beyond what fp16 can hold.
        """
        codec.check_peak(float(self.peak))
        codec.check_means(self.means)


def channel_sums(tokens: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares of each channel: tokens [..., C] -> [2, C], float64, or float32 on MPS, which lacks it."""
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
    flat = tokens.reshape(-1, tokens.shape[-1]).to(dtype)
    return torch.stack([flat.sum(0), flat.square().sum(0)])
