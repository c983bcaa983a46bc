"""MAE as its paper and its authors' code have it (He et al. 2022): what the student with `--target pixels` must equal, and be faster than.

Written anew from the description, in the authors' way: all patches are embedded and three quarters thrown away, attention is spelled
out with its softmax, mask tokens are put in and sorted back to their places, the decoder computes all 197 tokens in all eight blocks,
the loss of every patch is computed and multiplied by the mask. Parameters have the names of MAE's published checkpoints.

Shapes: B images, N patches, V of them visible, D the encoder's width, W the decoder's, P the patch's side.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.student.targets import patchify

DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 512, 8, 16


class Attention(nn.Module):
    """Softmax attention, every product by itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, n, width], all to all."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((query @ key.transpose(2, 3)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, n, width]."""
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, n, width]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PublishedMae(nn.Module):
    """The whole of it: images and an order of their patches in, the loss out.

    Args:
        patch_size: P.
        width: D.
        depth: of the encoder.
        heads: of the encoder.
        visible: V.
        positions: float32 [N, D] and [N, W], fixed; those of the class token are zero.
        decoder: width, depth and heads.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        visible: int,
        positions: tuple[torch.Tensor, torch.Tensor],
        decoder: tuple[int, int, int] = (DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS),
    ):
        super().__init__()
        self.patch_size, self.visible = patch_size, visible
        decoder_width, decoder_depth, decoder_heads = decoder
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed, self.decoder_pos_embed = (
            nn.Parameter(F.pad(grid, (0, 0, 1, 0))[None], requires_grad=False) for grid in positions
        )
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, 3 * patch_size**2)

    def forward(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            images: float [B, 3, H, W], normalised.
            ids_shuffle: int64 [B, N], as `Student.forward` has it: MAE's shuffle.
        """
        return self.loss(images, self.predict(images, ids_shuffle), ids_shuffle)

    def predict(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """[B, N, 3 P^2], of all patches, at their own places."""
        return self._decode(self._encode(images, ids_shuffle), ids_shuffle.argsort(dim=1))

    def loss(self, images: torch.Tensor, prediction: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """Mean squared error with the normalised pixels, over the masked patches."""
        target = patchify(images, self.patch_size)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
        error = ((prediction - target) ** 2).mean(dim=-1)
        masked = torch.ones_like(error)
        masked[:, : self.visible] = 0
        masked = masked.gather(1, ids_shuffle.argsort(dim=1))
        return (error * masked).sum() / masked.sum()

    def _encode(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """[B, 1 + V, D], after the norm."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        kept = patches.gather(1, ids_shuffle[:, : self.visible, None].repeat(1, 1, patches.shape[2]))
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([class_token, kept], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def _decode(self, encoded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[B, N, 3 P^2]; places: int64 [B, N], where in the shuffle each patch is."""
        tokens = self.decoder_embed(encoded)
        missing = places.shape[1] + 1 - tokens.shape[1]
        shuffled = torch.cat([tokens[:, 1:], self.mask_token.repeat(len(tokens), missing, 1).to(tokens.dtype)], dim=1)
        sorted_back = shuffled.gather(1, places[:, :, None].repeat(1, 1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], sorted_back], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]


def published_names(student: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A student's weights under the names, and in the shapes, of MAE's published checkpoints.

    Args:
        student: the state of a `Student` with a decoder, without heads of the layers.
    """
    renamed = {}
    for name, weight in student.items():
        if name == "decoder_position":
            renamed["decoder_pos_embed"] = F.pad(weight, (0, 0, 1, 0))[None]  # a row of zeros for the class token
        else:
            renamed[name.removeprefix("encoder.").replace("decoder_head.", "decoder_pred.")] = weight
    return renamed
