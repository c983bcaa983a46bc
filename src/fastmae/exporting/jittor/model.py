"""A vision transformer for Jittor, and how to load weights into it that `fastmae export --format jittor` has written.

    import model

    encoder = model.load(".")         # the folder of this file, with config.json and model.safetensors
    features = encoder(images)        # images: jt.Var [B, K, S, S], normalised -> [B, D], or a classifier's logits
    tokens = encoder.tokens(images)   # [B, R + N, D]: class token and registers, if there are any; patch tokens

The network and the names of its weights are those of timm's VisionTransformer. This file needs Jittor and numpy, and
nothing of fastmae; you may change it as you like. Shapes: B images, N patches, R prefix tokens, D the width, H heads.

Part of fastmae. SPDX-License-Identifier: Apache-2.0
"""

import json
import math
from pathlib import Path
from typing import Any

import jittor as jt
import numpy as np
from jittor import nn

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def load(folder: str | Path) -> "VisionTransformer":
    """The network that a folder describes, with its weights, in evaluation mode.

    Raises:
        ValueError: the weights are those of another network.
    """
    config = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    network = VisionTransformer(**config["network"])
    weights = read_safetensors(Path(folder) / WEIGHTS_FILE)
    parameters = dict(network.named_parameters())
    if parameters.keys() != weights.keys():
        raise ValueError(f"{folder}: its weights do not fit its config: {sorted(parameters.keys() ^ weights.keys())}")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != weights[name].shape:
            raise ValueError(f"{folder}: {name} is {weights[name].shape}, not {tuple(parameter.shape)}")
        parameter.assign(jt.array(weights[name]))
    network.eval()
    return network


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The float32 arrays in a safetensors file: eight bytes of length, that much JSON, then the values."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = (start + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(data[first:end], dtype="<f4").reshape(entry["shape"])
    return arrays


class LayerNorm(nn.Module):
    """Over the last axis. Jittor's own takes E[x^2] - E[x]^2, which loses digits where the mean is large."""

    def __init__(self, width: int, eps: float):
        self.weight, self.bias, self.eps = jt.ones(width), jt.zeros(width), eps

    def execute(self, x: Any) -> Any:
        """[..., D] -> [..., D]."""
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / jt.sqrt(variance + self.eps) * self.weight + self.bias


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        self.gamma = jt.ones(width)

    def execute(self, x: Any) -> Any:
        """[..., D] -> [..., D]."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, qkv_bias: bool):
        self.heads, self.scale = heads, 1 / math.sqrt(width // heads)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def execute(self, x: Any) -> Any:
        """[B, L, D] -> [B, L, D]."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, L, D / H]
        query, key, value = qkv[0] * self.scale, qkv[1], qkv[2]
        weights = nn.softmax(nn.matmul(query, key.permute(0, 1, 3, 2)), dim=-1)  # [B, H, L, L]
        return self.proj(nn.matmul(weights, value).permute(0, 2, 1, 3).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.quick_gelu = quick_gelu

    def execute(self, x: Any) -> Any:
        """[..., D] -> [..., D]."""
        x = self.fc1(x)
        return self.fc2(x * jt.sigmoid(1.702 * x) if self.quick_gelu else nn.gelu(x))


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a shortcut."""

    def __init__(
        self, width: int, heads: int, hidden: int, eps: float, qkv_bias: bool, layer_scale: bool, quick_gelu: bool
    ):
        self.norm1, self.norm2 = LayerNorm(width, eps), LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads, qkv_bias), Mlp(width, hidden, quick_gelu)
        self.ls1, self.ls2 = (LayerScale(width) if layer_scale else nn.Identity() for _ in range(2))

    def execute(self, x: Any) -> Any:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A linear layer on each patch; its weights have the shape of a convolution's, [D, K, P, P]."""

    def __init__(self, channels: int, patch_size: int, width: int, bias: bool):
        self.proj = nn.Conv(channels, width, patch_size, stride=patch_size, bias=bias)

    def execute(self, images: Any) -> Any:
        """[B, K, S, S] -> [B, N, D]."""
        return self.proj(images).flatten(2).permute(0, 2, 1)


class VisionTransformer(nn.Module):
    """The network.

    Args:
        image_size: S, in pixels.
        patch_size: P, in pixels.
        channels: K.
        width: D.
        depth: number of blocks.
        heads: H, of each block.
        hidden: width of the MLPs.
        eps: of the norms.
        class_token: whether there is one.
        registers: number of register tokens.
        prefix_positions: whether class token and registers have position embeddings.
        qkv_bias: whether queries, keys and values have a bias.
        patch_bias: whether the patch embedding has a bias.
        layer_scale: whether the blocks have factors for each channel.
        quick_gelu: the approximate GELU of CLIP instead of the exact one.
        pre_norm: whether there is a norm before the blocks.
        final_norm: whether there is a norm after them.
        pool_norm: whether there is a norm after pooling.
        pool: 'avg': the mean of the patch tokens; 'token': the class token.
        classes: number of logits; 0: no classifier.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        eps: float,
        class_token: bool,
        registers: int,
        prefix_positions: bool,
        qkv_bias: bool,
        patch_bias: bool,
        layer_scale: bool,
        quick_gelu: bool,
        pre_norm: bool,
        final_norm: bool,
        pool_norm: bool,
        pool: str,
        classes: int,
    ):
        self.prefix, self.prefix_positions, self.pool = class_token + registers, prefix_positions, pool
        patches = (image_size // patch_size) ** 2
        if class_token:
            self.cls_token = jt.zeros((1, 1, width))
        if registers:
            self.reg_token = jt.zeros((1, registers, width))
        self.pos_embed = jt.zeros((1, patches + self.prefix * prefix_positions, width))
        self.patch_embed = PatchEmbed(channels, patch_size, width, patch_bias)
        block = (width, heads, hidden, eps, qkv_bias, layer_scale, quick_gelu)
        self.blocks = nn.ModuleList([Block(*block) for _ in range(depth)])
        self.norm_pre = LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.norm = LayerNorm(width, eps) if final_norm else nn.Identity()
        self.fc_norm = LayerNorm(width, eps) if pool_norm else nn.Identity()
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def tokens(self, images: Any) -> Any:
        """Images [B, K, S, S] -> the tokens after the final norm, [B, R + N, D]."""
        x = self.patch_embed(images)
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        prefix = [token.expand(x.shape[0], token.shape[1], token.shape[2]) for token in prefix]
        if self.prefix_positions:
            x = jt.concat([*prefix, x], dim=1) + self.pos_embed
        else:
            x = jt.concat([*prefix, x + self.pos_embed], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def execute(self, images: Any) -> Any:
        """Images [B, K, S, S] -> features [B, D], or logits [B, classes]."""
        tokens = self.tokens(images)
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, self.prefix :].mean(1)
        return self.head(self.fc_norm(pooled))
