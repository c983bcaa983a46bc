"""Linear layers on a CPU with AVX-512: large ones as convolutions of kernel 1, the same products.

torch hands fp32 matrix products to MKL, which on AMD's processors keeps to AVX2, and convolutions to oneDNN, which takes AVX-512 wherever
it is. One core of an AMD EPYC (Zen 5) did 105 GFLOP/s the one way and 220 the other, forward and backward; a ViT-B's step took 9.7 s and
5.3 s. Elsewhere, and for small layers, all is as torch has it.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

AVX512 = torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
LEAST_BATCH = 16
"""Below it, torch on one thread does not give convolutions of kernel 1 to oneDNN."""
LEAST_PRODUCTS = 2**23
"""Multiplications below which the way through a convolution took longer (equal at 5 million, 1.5 times as fast at 25 million)."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, by the faster of the two ways.

    Args:
        tokens: [..., D].
        weight: [C, D].
        bias: [C].

    Returns:
        [..., C].
    """
    if not _pays_as_convolution(tokens, weight):
        return F.linear(tokens, weight, bias)
    pixels = tokens.flatten(1, -2).unsqueeze(1).permute(0, 3, 1, 2)  # [B, D, 1, N], channels last: no copy
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], len(weight))


class Linear(nn.Linear):
    """torch's, computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that nn.Linear has
        """[..., D] -> [..., C]."""
        return linear(input, self.weight, self.bias)


def with_fast_linear(network: AnyModule) -> AnyModule:
    """The same network, with all its linear layers computed by `linear`; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return network


def _pays_as_convolution(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    plain = tokens.device.type == "cpu" and tokens.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    large = tokens.dim() > 2 and len(tokens) >= LEAST_BATCH and tokens.numel() * len(weight) >= LEAST_PRODUCTS
    return AVX512 and plain and large
