"""A block of the decoder: timm's, but computing only what is asked for. The parameters, their names and the function are timm's.

Shapes: B views, V visible patches a view (with the class token, where the decoder sees it), H masked ones, N places, W the width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block


class DecoderBlock(Block):
    """A transformer block that spares two kinds of work, a third of a one-block decoder's.

    The last block's queries, its MLP and what follows are needed for the patches that are predicted alone: keys and values come from all.
    And in the first block all masked patches of one place are alike, in every view: they are normalised and projected once a place.
    """

    attn: Any

    def forward(  # type: ignore[override]  # timm's takes tokens alone, and attention masks that a decoder has no use for
        self, tokens: torch.Tensor, first: int = 0, masked: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What timm's block gives from place `first` on.

        Args:
            tokens: [B, V, W], or [B, V + H, W] when `masked` is not given.
            first: of the tokens that are computed; the others are only attended to.
            masked: the rest of the tokens: [N, W], what a masked patch of each place is, and int64 [B, H], their places.

        Returns:
            [B, V + H - first, W].
        """
        qkv = self.attn.qkv(self.norm1(tokens))
        if masked is not None:
            by_place, places = masked
            qkv = torch.cat([qkv, F.embedding(places, self.attn.qkv(self.norm1(by_place)))], dim=1)
            tokens = torch.cat([tokens, F.embedding(places, by_place)], dim=1)
        query, key, value = qkv.unflatten(2, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query[:, :, first:], key, value)
        tokens = tokens[:, first:] + self.attn.proj(seen.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))
