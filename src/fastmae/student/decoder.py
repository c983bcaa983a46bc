"""A block of the decoder: timm's block, without the work whose results the decoder does not need.

Parameters, their names, and what is computed are timm's.

Shapes: B views, N patches per view, V visible and M masked ones, U prefix tokens that the decoder does not see, W its
width. V counts the prefix tokens that it sees.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from fastmae.runtime.fast_linear import linear
from fastmae.student.attention import heads_of
from fastmae.student.lookup import keys_and_values, linear_plus_rows


class DecoderBlock(Block):
    """A transformer block that saves a third of the work of a one-block decoder, in two ways.

    In the last block, only the predicted patches need queries and an MLP; all tokens give keys and values.
    In the first block, a masked patch is the mask token plus its position, which is the same in every view: norm and
    projection run once for each of the N positions instead of B * M times.
    """

    attn: Any

    def forward(  # type: ignore[override]  # timm's block also takes attention masks, which a decoder does not need
        self,
        tokens: torch.Tensor,
        first: int = 0,
        masked: tuple[torch.Tensor, torch.Tensor] | None = None,
        unseen: int = 0,
    ) -> torch.Tensor:
        """What timm's block gives, from token `first` on.

        Args:
            tokens: [B, U + V, W] with `masked`, else [B, U + V + M, W].
            first: index of the first token that is computed; the tokens before it are only attended to.
            masked: the masked patches, which follow `tokens`: the mask token at each position, [N, W], and the
                positions int64 [B, M].
            unseen: U, the number of leading tokens to leave out. They are no tokens of this block, and not counted by
                `first`.

        Returns:
            [B, V + M - first, W].
        """
        if masked is not None and first == tokens.shape[1] - unseen:
            tokens = self._attended_from_masked(tokens, *masked, unseen)
        else:
            tokens = self._attended(tokens[:, unseen:], first, masked)
        return tokens + self.mlp(self.norm2(tokens))

    def _attended(
        self, tokens: torch.Tensor, first: int, masked: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """The first half of the block, for the tokens from `first` on: [B, V + M - first, W]."""
        qkv = self.attn.qkv(self.norm1(tokens))  # [B, V, 3 W]
        if masked is not None:
            # Project the mask token once per position, then look up each masked patch: V -> V + M tokens.
            mask_tokens, ids_mask = masked
            qkv = torch.cat([qkv, F.embedding(ids_mask, self.attn.qkv(self.norm1(mask_tokens)))], dim=1)
            tokens = torch.cat([tokens, F.embedding(ids_mask, mask_tokens)], dim=1)
        # Attention of the tokens from `first` on to all tokens; q, k and v are [B, heads, V + M, W / heads].
        q, k, v = heads_of(qkv, self.attn.num_heads)
        attended = F.scaled_dot_product_attention(q[:, :, first:], k, v)
        return tokens[:, first:] + self.attn.proj(attended.transpose(1, 2).flatten(2))

    def _attended_from_masked(
        self, tokens: torch.Tensor, mask_tokens: torch.Tensor, ids_mask: torch.Tensor, unseen: int
    ) -> torch.Tensor:
        """The same for the masked patches alone, [B, M, W]. All of theirs is looked up, and the others need no queries.

        With M = 3 V, this halves the memory traffic of the first half.
        """
        width, qkv, proj = tokens.shape[2], self.attn.qkv, self.attn.proj
        of_visible = linear(self.norm1(tokens), qkv.weight[width:], qkv.bias[width:])  # [B, U + V, 2 W]
        q_table, kv_table = qkv(self.norm1(mask_tokens)).split([width, 2 * width], dim=1)
        parts = F.embedding(ids_mask, q_table), *keys_and_values(of_visible, kv_table, ids_mask, unseen)
        q, k, v = (part.unflatten(2, (self.attn.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, M, W]
        return linear_plus_rows(attended, proj.weight, proj.bias, mask_tokens, ids_mask)
