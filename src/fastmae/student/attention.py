"""timm's attention, whose backward pass writes the gradient of q, k and v once instead of twice."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class PackedAttention(Attention):
    """timm's attention without its options. Parameters, their names, and what is computed are timm's.

    timm moves q, k and v to the front before it takes them apart. Autograd then stacks their gradients in front, and
    copies the stack into the layout of the projection's output: 12 D bytes a token and block in half precision.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]. The encoder of a student has no attention mask."""
        assert attn_mask is None and not is_causal
        q, k, v = heads_of(self.qkv(x), self.num_heads)
        attended: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


def heads_of(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """[B, N, 3 D] -> q, k and v, each [B, heads, N, D / heads], whose gradients are joined in the layout of `qkv`."""
    return tuple(part.transpose(1, 2) for part in qkv.unflatten(2, (3, heads, -1)).unbind(2))


def with_packed_attention(network: AnyModule) -> AnyModule:
    """The same network; its attention layers without options are of the class `PackedAttention`."""
    for module in network.modules():
        if type(module) is Attention and _has_no_options(module):
            module.__class__ = PackedAttention
    return network


def _has_no_options(attention: Attention) -> bool:
    parts = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    has_norms = any(not isinstance(part, nn.Identity | None) for part in parts)
    return attention.fused_attn and not has_norms and not attention.attn_drop.p and not attention.proj_drop.p
