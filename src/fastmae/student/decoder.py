"""A block of the decoder: timm's block, without the work whose results the decoder does not need.

Parameters, their names, and what is computed are timm's.

Shapes: B views, N patches per view, V visible and M masked ones, W the decoder's width. V counts the prefix tokens too,
where the decoder sees them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from fastmae.student.attention import heads_of


class DecoderBlock(Block):
    """A transformer block that saves a third of the work of a one-block decoder, in two ways.

    In the last block, only the predicted patches need queries and an MLP; all tokens give keys and values.
    In the first block, a masked patch is the mask token plus its position, which is the same in every view: norm and
    projection run once for each of the N positions instead of B * M times.
    """

    attn: Any

    def forward(  # type: ignore[override]  # timm's block also takes attention masks, which a decoder does not need
        self, tokens: torch.Tensor, first: int = 0, masked: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What timm's block gives, from token `first` on.

        Args:
            tokens: [B, V, W] with `masked`, else [B, V + M, W].
            first: index of the first token that is computed; the tokens before it are only attended to.
            masked: the masked patches, which follow `tokens`: the mask token at each position, [N, W], and the
                positions int64 [B, M].

        Returns:
            [B, V + M - first, W].
        """
        qkv = self.attn.qkv(self.norm1(tokens))  # [B, V, 3 W]
        if masked is not None:
            # Project the mask token once per position, then look up each masked patch: V -> V + M tokens.
            mask_tokens, ids_mask = masked
            qkv = torch.cat([qkv, F.embedding(ids_mask, self.attn.qkv(self.norm1(mask_tokens)))], dim=1)
            tokens = torch.cat([tokens, F.embedding(ids_mask, mask_tokens)], dim=1)
        # Attention of the tokens from `first` on to all tokens; q, k and v are [B, heads, V + M, W / heads].
        q, k, v = heads_of(qkv, self.attn.num_heads)
        attended = F.scaled_dot_product_attention(q[:, :, first:], k, v)
        # Residuals and MLP, of the same tokens.
        tokens = tokens[:, first:] + self.attn.proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))
