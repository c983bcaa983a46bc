"""MAE computed as its authors' code does it (He et al. 2022): the baseline of `bench step`, and a reference for tests.

The student with `--target pixels` must equal this function and be faster than it. This module is our own code, written
from the paper and not taken from the authors' repository. It works in their way: all patches are embedded and the
masked ones are dropped; attention writes out its softmax; mask tokens are appended and sorted back to their positions;
the decoder computes all tokens in every block; the loss is computed for every patch and multiplied by the mask.
Parameters have the names of MAE's published checkpoints.

Shapes: B images, N patches, V of them visible, n tokens, D the encoder's width, W the decoder's width, P the side of a
patch in pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head attention with its softmax written out, not fused."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, n, width] -> [B, n, width]. Every token attends to all."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((query @ key.transpose(2, 3)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a hidden width of four times the input's."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, n, width] -> [B, n, width]."""
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, n, width] -> [B, n, width]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PublishedMae(nn.Module):
    """MAE's encoder, decoder and loss.

    Args:
        patch_size: side of a patch in pixels, P.
        width: width of the encoder, D.
        depth: number of the encoder's blocks.
        heads: number of the encoder's attention heads.
        visible: number of visible patches, V.
        positions: fixed position embeddings of the patches, float32 [N, D] for the encoder and [N, W] for the decoder;
            the class token's are zero.
        decoder: width, number of blocks and number of attention heads of the decoder.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        visible: int,
        positions: tuple[torch.Tensor, torch.Tensor],
        decoder: tuple[int, int, int],
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
        """The loss, a scalar.

        Args:
            images: normalised, float [B, 3, H, W].
            ids_shuffle: a random order of each image's patches, int64 [B, N]; the first V are visible.
        """
        return self.loss(images, self.predict(images, ids_shuffle), ids_shuffle)

    def predict(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """The predicted pixels of all patches in image order, [B, N, 3 P^2]."""
        return self._decode(self._encode(images, ids_shuffle), ids_restore=ids_shuffle.argsort(dim=1))

    def loss(self, images: torch.Tensor, prediction: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """Mean squared error between prediction [B, N, 3 P^2] and normalised pixels, over the masked patches."""
        target = _patchify(images, self.patch_size)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
        error = ((prediction - target) ** 2).mean(dim=-1)
        mask = torch.ones_like(error)
        mask[:, : self.visible] = 0
        mask = mask.gather(1, ids_shuffle.argsort(dim=1))
        return (error * mask).sum() / mask.sum()

    def _encode(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """The class token and the visible patches after the last norm, [B, 1 + V, D]."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        ids_keep = ids_shuffle[:, : self.visible]
        visible = patches.gather(1, ids_keep[:, :, None].repeat(1, 1, patches.shape[2]))
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([class_token, visible], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def _decode(self, encoded: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """The predicted pixels of all patches, [B, N, 3 P^2].

        Args:
            encoded: the encoder's output, [B, 1 + V, D].
            ids_restore: position of each patch in the shuffled order, int64 [B, N].
        """
        tokens = self.decoder_embed(encoded)
        masked = ids_restore.shape[1] + 1 - tokens.shape[1]
        shuffled = torch.cat([tokens[:, 1:], self.mask_token.repeat(len(tokens), masked, 1).to(tokens.dtype)], dim=1)
        restored = shuffled.gather(1, ids_restore[:, :, None].repeat(1, 1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], restored], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]


def _patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, K, H, W] -> [B, N, P * P * K]: patches row by row, and so the pixels of a patch, colours last."""
    batch, channels, height, width = images.shape
    rows, cols = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, cols, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, rows * cols, patch_size**2 * channels)
