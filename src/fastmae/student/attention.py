"""timm's attention and block, with less memory traffic. Parameters, their names, and what is computed are timm's."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from fastmae.runtime.fast_linear import norm_and_linear
from fastmae.runtime.low_precision import LayerNorm, fold_norm

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class PackedAttention(Attention):
    """timm's attention without its options, whose backward pass writes the gradient of q, k and v once, not twice.

    timm moves q, k and v to the front before it takes them apart. Autograd then stacks their gradients in front, and
    copies the stack into the layout of the projection's output: 12 D bytes a token and block in half precision.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]. The encoder of a student has no attention mask."""
        assert attn_mask is None and not is_causal
        return self.attend(self.qkv(x))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values [B, N, 3 D] -> [B, N, D]."""
        q, k, v = heads_of(qkv, self.num_heads)
        attended: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


class PackedBlock(Block):
    """timm's block around `PackedAttention`, whose first norm can serve a head on the layer before, too.

    A head that normalises these tokens for itself reads and writes them once more, forward and backward.
    """

    attn: PackedAttention
    norm1: LayerNorm

    def forward(  # type: ignore[override]  # timm's also takes attention masks, which the encoder of a student has not
        self, tokens: torch.Tensor, with_normed: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[B, N, D] -> [B, N, D]; `with_normed`, also the normalised input without scale and shift, [B, N, D]."""
        if not with_normed:
            return super().forward(tokens)
        norm, qkv = self.norm1, self.attn.qkv
        weight, bias = fold_norm(norm.weight, norm.bias, qkv.weight, qkv.bias)
        projected, normed = norm_and_linear(tokens, norm.eps, weight, bias)
        tokens = tokens + self.drop_path1(self.ls1(self.attn.attend(projected)))
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens)))), normed


def heads_of(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """[B, N, 3 D] -> q, k and v, each [B, heads, N, D / heads], whose gradients are joined in the layout of `qkv`."""
    return tuple(part.transpose(1, 2) for part in qkv.unflatten(2, (3, heads, -1)).unbind(2))


def with_packed_attention(network: AnyModule) -> AnyModule:
    """The same network; its attention layers without options, and timm's blocks around them, are of the classes above.

    A block is one of them if its norm is fastmae's `LayerNorm`.
    """
    for module in network.modules():
        if type(module) is Attention and _has_no_options(module):
            module.__class__ = PackedAttention
    for module in network.modules():
        if type(module) is Block and type(module.attn) is PackedAttention and type(module.norm1) is LayerNorm:
            module.__class__ = PackedBlock
    return network


def _has_no_options(attention: Attention) -> bool:
    parts = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    has_norms = any(not isinstance(part, nn.Identity | None) for part in parts)
    return attention.fused_attn and not has_norms and not attention.attn_drop.p and not attention.proj_drop.p
