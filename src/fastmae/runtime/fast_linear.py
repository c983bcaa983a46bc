"""Linear layers on a CPU with AVX-512: the large ones run as convolutions with kernel size 1, which is faster.

torch gives fp32 matrix products to MKL, which uses only AVX2 on AMD's processors, and convolutions to oneDNN, which
uses AVX-512 wherever it exists. One core of an AMD EPYC (Zen 5) computed 105 GFLOP/s with MKL and 220 with oneDNN,
forward and backward; a ViT-B's step took 9.7 s and 5.3 s. On other devices, and for small layers, torch's own way is
kept.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.runtime.low_precision import layer_norm, no_autocast

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


def norm_and_linear(
    tokens: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer norm without scale and shift and a linear layer behind it, where something else reads the norm too.

    The backward product adds to the other reader's gradient. Autograd alone would write two gradients, and read both to
    add them.

    Args:
        tokens: [B, N, D].
        eps: added to the variance.
        weight: [C, D].
        bias: [C].

    Returns:
        The linear layer's output, [B, N, C], and the normalised tokens. The gradient that comes back through these must
        belong to nothing else, because this layer adds to it in place. An addition, for one, hands the same gradient to
        both terms.
    """
    is_plain = torch.compiler.is_compiling() or is_faster_as_convolution(tokens, weight)
    if is_plain or tokens.dtype != weight.dtype:
        normed = layer_norm(tokens, eps)
        return linear(normed, weight, bias), normed
    output, normed = _NormAndLinear.apply(tokens, eps, weight, bias)
    return output, normed


class _NormAndLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with no_autocast(tokens):  # which would make the norm's output float32
            normed, mean, rstd = torch.native_layer_norm(tokens, tokens.shape[-1:], None, None, eps)
        ctx.save_for_backward(tokens, mean, rstd, normed, weight)
        ctx.set_materialize_grads(False)
        return F.linear(normed, weight, bias), normed

    @staticmethod
    def backward(ctx: Any, of_output: torch.Tensor, of_normed: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tokens, mean, rstd, normed, weight = ctx.saved_tensors
        of_rows, rows = of_output.flatten(0, 1), normed.flatten(0, 1)
        if of_normed is None:
            of_normed = of_output @ weight
        else:
            of_normed = of_normed.contiguous()
            sums = of_normed.flatten(0, 1)
            torch.addmm(sums, of_rows, weight, out=sums)
        of_tokens, _, _ = torch.ops.aten.native_layer_norm_backward(
            of_normed, tokens, tokens.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        return of_tokens, None, of_rows.T @ rows, of_rows.sum(0)


def linear_each(tokens: Sequence[torch.Tensor], weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Several linear layers of one shape, each applied to its own tokens. Their outputs lie in one tensor.

    Args:
        tokens: L tensors [B, N, D], of the weights' dtype.
        weights: [L, C, D].
        biases: [L, C].

    Returns:
        [L, B, N, C].
    """
    if is_faster_as_convolution(tokens[0], weights[0]):
        layers = zip(tokens, weights, biases, strict=True)
        return torch.stack([linear(layer, weight, bias) for layer, weight, bias in layers])
    rows = [layer.flatten(0, 1) for layer in tokens]
    if torch.compiler.is_compiling():  # a compiled graph writes the tokens straight into the stack
        outputs = torch.baddbmm(biases[:, None], torch.stack(rows), weights.transpose(1, 2))
    else:
        outputs = _LinearEach.apply(weights, biases, *rows)
    return outputs.unflatten(1, tokens[0].shape[:2])


class _LinearEach(torch.autograd.Function):
    """Rows [M, D] -> [L, M, C]. A batched product would first need all rows in one tensor: a copy of each."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, biases: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights, *rows)
        outputs = weights.new_empty(len(rows), len(rows[0]), weights.shape[1])
        for layer, weight, bias, output in zip(rows, weights, biases, outputs, strict=True):
            torch.addmm(bias, layer, weight.T, out=output)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, *rows = ctx.saved_tensors
        of_weights = torch.empty_like(weights)
        for layer, gradient, of_weight in zip(rows, gradients, of_weights, strict=True):
            torch.mm(gradient.T, layer, out=of_weight)
        of_rows = [gradient @ weight for gradient, weight in zip(gradients, weights, strict=True)]
        return of_weights, gradients.sum(1), *of_rows


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
