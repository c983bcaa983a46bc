"""Mixed precision with fewer kernels and less memory traffic than torch's autocast has by itself.

Autocast casts every weight in a kernel of its own, and again every gradient. It also runs layer norm in fp32, so the
activations between the blocks are fp32, and each norm's output is cast once more. Casts were 408 of the kernels of a
ViT-B's step, and 38 of its 263 MB of traffic a view (`bench step --count`). Here a block's weights are cast together,
and the activations keep autocast's dtype (the norms' statistics are computed in fp32 all the same). Weights, their
gradients and the optimizer stay in fp32. Without autocast, nothing changes.
"""

from contextlib import AbstractContextManager
from typing import Any, TypeVar

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import fast_layer_norm
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension. Under autocast it takes and gives autocast's dtype.

    Args:
        width: size of the last dimension.
        eps: added to the variance.
        options: more arguments of torch's.
    """

    def __init__(self, width: int, eps: float = 1e-6, **options: Any):
        super().__init__(width, eps, **options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.LayerNorm
        """[..., width] -> the same shape."""
        normed: torch.Tensor = fast_layer_norm(input, list(self.normalized_shape), self.weight, self.bias, self.eps)
        return normed


def with_fast_norms(network: AnyModule) -> AnyModule:
    """The same network; all its layer norms are of the class `LayerNorm`. Parameters and their names stay."""
    for module in network.modules():
        if type(module) in (nn.LayerNorm, timm.layers.LayerNorm):
            module.__class__ = LayerNorm
    return network


def call_cast(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """`module(*inputs, **options)`; under autocast, all of the module's weights are cast in one kernel.

    A compiled graph casts them together anyway, and FSDP has cast them already.
    """
    weights = dict(module.named_parameters())
    first = next(iter(weights.values()), None)
    if first is None or isinstance(first, DTensor) or not _is_cast(first) or torch.compiler.is_compiling():
        return module(*inputs, **options)
    copies = cast_together(list(weights.values()), torch.get_autocast_dtype(first.device.type))
    return functional_call(module, dict(zip(weights, copies, strict=True)), inputs, options)


def cast_together(weights: list[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Copies of weights in another dtype, and of their gradients in the weights' own, in one kernel each way."""
    return _CastTogether.apply(dtype, *weights)


def layer_norm(tokens: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension, without scale and shift, in the dtype of `tokens` even under autocast."""
    with no_autocast(tokens):
        return F.layer_norm(tokens, tokens.shape[-1:], eps=eps)


def fold_norm(
    scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear layer that does what a norm's scale g and shift b do, and a linear layer after them.

    W (g x + b) + c = (W g) x + (W b + c). Computed in the weights' dtype, even under autocast.

    Args:
        scale: g, [..., D].
        shift: b, [..., D].
        weight: W, [..., C, D].
        bias: c, [..., C]; None: zero.

    Returns:
        Weight [..., C, D] and bias [..., C].
    """
    with no_autocast(weight):
        shifted = (weight @ shift.unsqueeze(-1)).squeeze(-1)
        return weight * scale.unsqueeze(-2), shifted if bias is None else bias + shifted


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the device of a tensor."""
    return torch.autocast(tensor.device.type, enabled=False)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product with this tensor runs: autocast's, or the tensor's own without autocast."""
    return torch.get_autocast_dtype(tensor.device.type) if _is_cast(tensor) else tensor.dtype


def _is_cast(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and torch.is_autocast_enabled(tensor.device.type)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = [gradient for gradient in gradients if gradient is not None]
        kept = [dtype for dtype, gradient in zip(ctx.dtypes, gradients, strict=True) if gradient is not None]
        copies = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in zip(found, kept, strict=True)]
        torch._foreach_copy_(copies, found)
        remaining = iter(copies)
        return (None, *(None if gradient is None else next(remaining) for gradient in gradients))
