"""Linear layers on a CPU with AVX-512: the large ones run as convolutions with kernel size 1, which is faster.

torch gives fp32 matrix products to MKL, which uses only AVX2 on AMD's processors, and convolutions to oneDNN, which
uses AVX-512 wherever it exists. One core of an AMD EPYC (Zen 5) computed 105 GFLOP/s with MKL and 220 with oneDNN,
forward and backward; a ViT-B's step took 9.7 s and 5.3 s. On other devices, and for small layers, torch's own way is
kept.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

AVX512 = torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
LEAST_BATCH = 16
"""For smaller batches, torch with one thread does not give convolutions with kernel size 1 to oneDNN."""
LEAST_PRODUCTS = 2**23
"""Multiplications from which the convolution is used: as fast as MKL at 5 million, 1.5 times as fast at 25 million."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, computed in the faster of the two ways.

    Args:
        tokens: [..., D].
        weight: [C, D].
        bias: [C].

    Returns:
        [..., C].
    """
    if not is_faster_as_convolution(tokens, weight):
        return F.linear(tokens, weight, bias)
    pixels = tokens.flatten(1, -2).unsqueeze(1).permute(0, 3, 1, 2)  # [B, D, 1, N], channels last: no copy
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], len(weight))


def batched_linear(tokens: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Several linear layers of one shape at once: one batched product, or on such a CPU one convolution each.

    Args:
        tokens: [L, B, N, D], of the weights' dtype.
        weights: [L, C, D].
        biases: [L, C].

    Returns:
        [L, B, N, C].
    """
    if is_faster_as_convolution(tokens[0], weights[0]):
        layers = zip(tokens, weights, biases, strict=True)
        return torch.stack([linear(layer, weight, bias) for layer, weight, bias in layers])
    rows = torch.baddbmm(biases[:, None], tokens.flatten(1, 2), weights.transpose(1, 2))
    return rows.unflatten(1, tokens.shape[1:3])


def is_faster_as_convolution(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` computes these as a convolution. tokens: [..., D]; weight: [C, D]."""
    is_fp32 = tokens.device.type == "cpu" and tokens.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_large = tokens.dim() > 2 and len(tokens) >= LEAST_BATCH and tokens.numel() * len(weight) >= LEAST_PRODUCTS
    return AVX512 and is_fp32 and is_large


class Linear(nn.Linear):
    """torch's linear layer, computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Linear
        """[..., D] -> [..., C]."""
        return linear(input, self.weight, self.bias)


def with_fast_linear(network: AnyModule) -> AnyModule:
    """The same network; `linear` computes all its linear layers. Parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return network
