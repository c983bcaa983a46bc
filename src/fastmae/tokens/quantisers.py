"""The arithmetic of the codecs: tokens to codes and back. `codec` holds the formulas and says what a store keeps.

No quantiser learns here (`learn`), and none knows of files.
"""

import contextlib
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ENTRIES = 256
"""Values of a byte: centroids in a group, and steps of int8."""
BLOCK = 64
"""Tokens that pq encodes at a time on a CPU, the last block padded with zeros. A matrix product of another shape may
sum in another order and decide a near-tie differently. Also, the scores of a block, 64 x M x 256, stay in a core's
cache: 119 k tokens/s at C = 384, M = 48, against 81 k with blocks of 1024."""
LARGE_BLOCK = 1 << 13
"""Tokens that pq encodes at a time on an accelerator, which needs much work in each launch. The scores take 320 MB at
M = 38."""


class Quantiser:
    """Encodes and decodes rows of tokens. Learnt arrays are copied to a device when they are first needed there.

    Args:
        arrays: what codebooks.safetensors holds, by name.
    """

    def __init__(self, **arrays: np.ndarray):
        self.arrays = arrays

    def __getstate__(self) -> dict[str, Any]:
        # The process that needs copies and tables makes its own: pq's tables are as large as a thousand images.
        return {name: value for name, value in self.__dict__.items() if name not in {"_copies", "_tables"}}

    @cached_property
    def _copies(self) -> dict[torch.device, dict[str, torch.Tensor]]:
        return {}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays as tensors on a device."""
        if device not in self._copies:
            self._copies[device] = {name: torch.tensor(array, device=device) for name, array in self.arrays.items()}
        return self._copies[device]

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Finite tokens, float32 [n, C] -> codes [n, C']."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [n, C'] -> float32 [n, C], on the same device; `FloatCast` leaves float16 as it is."""
        raise NotImplementedError


class FloatCast(Quantiser):
    """fp32 and fp16: the numbers themselves."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 -> float16, where numbers from 65520 become infinite, or float32."""
        return tokens.to(self.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The codes: they are the tokens."""
        return codes


class ScalarQuantiser(Quantiser):
    """int8: each channel by itself, rounded to one of 256 equal steps; what lies beyond them is clamped.

    Args:
        offset: float32 [C], the value of code 0.
        scale: float32 [C], the width of a step.
    """

    def __init__(self, offset: np.ndarray, scale: np.ndarray):
        super().__init__(offset=offset, scale=scale)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, C] -> uint8 [n, C]."""
        learnt = self.on(tokens.device)
        return ((tokens - learnt["offset"]) / learnt["scale"]).round().clamp(0, ENTRIES - 1).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [n, C] -> float32 [n, C]."""
        learnt = self.on(codes.device)
        return learnt["offset"] + learnt["scale"] * codes.float()


class ProductQuantiser(Quantiser):
    """pq<M>: the rotated token in M pieces, each replaced by the number of the nearest of 256 centroids.

    Args:
        offset: float32 [C].
        forward: float32 [C, M d].
        inverse: float32 [M d, C].
        centroids: float32 [M, 256, d].
    """

    def __init__(self, offset: np.ndarray, forward: np.ndarray, inverse: np.ndarray, centroids: np.ndarray):
        super().__init__(offset=offset, forward=forward, inverse=inverse, centroids=centroids)
        self.groups, _, self.width = centroids.shape

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, C] -> uint8 [n, M]."""
        if tokens.device.type != "cpu":
            return self.encode_in_blocks(tokens, LARGE_BLOCK)
        padded = F.pad(tokens, (0, 0, 0, -len(tokens) % BLOCK))
        return self.encode_in_blocks(padded, BLOCK)[: len(tokens)]

    def encode_in_blocks(self, tokens: torch.Tensor, block: int) -> torch.Tensor:
        """float32 [n, C] -> uint8 [n, M], `block` tokens at a time."""
        learnt = self.on(tokens.device)
        centroids = learnt["centroids"].transpose(1, 2)
        half_norms = learnt["centroids"].square().sum(2)[:, None] / 2
        with torch.no_grad(), _float32(tokens.device):
            codes = [
                self._nearest((some - learnt["offset"]) @ learnt["forward"], centroids, half_norms)
                for some in tokens.split(block)
            ]
        return torch.cat(codes)

    def _nearest(self, rotated: torch.Tensor, centroids: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
        """Rotated tokens z [B, M d] -> codes uint8 [B, M].

        The score of a centroid c is |z - c|^2 / 2 without |z|^2 / 2, the same for all centroids: |c|^2 / 2 - z c.
        """
        pieces = rotated.unflatten(1, (self.groups, self.width)).transpose(0, 1)
        scores = torch.baddbmm(half_norms, pieces, centroids, alpha=-1)  # [M, B, 256]
        # On a CPU, NumPy's argmin takes a fraction of torch's time: 119 k tokens/s of encoding against 61 k.
        nearest = torch.from_numpy(scores.numpy().argmin(2)) if scores.device.type == "cpu" else scores.argmin(2)
        return nearest.T.to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [n, M] -> float32 [n, C]: by sums on a CPU, where they are 4 to 7 times as fast as the product."""
        return self.decode_by_sums(codes) if codes.device.type == "cpu" else self.decode_by_product(codes)

    def decode_by_sums(self, codes: torch.Tensor) -> torch.Tensor:
        """offset + sum_m tables[m, code[m]], on a CPU; on a core, 6,272 tokens take 11 ms at C = 768, M = 48."""
        peaks, tables = self._tables
        sums = F.embedding_bag(codes.int() + self._first_rows(codes.device), tables, mode="sum")
        return self.on(codes.device)["offset"] + peaks * sums.float()

    def decode_by_product(self, codes: torch.Tensor) -> torch.Tensor:
        """The same on any device: offset + (the codes' centroids, concatenated) @ inverse."""
        learnt = self.on(codes.device)
        with _float32(codes.device):
            pieces = F.embedding(codes.int() + self._first_rows(codes.device), learnt["centroids"].flatten(0, 1))
            return learnt["offset"] + pieces.flatten(1) @ learnt["inverse"]

    def mean_by_product(self, codes: torch.Tensor) -> torch.Tensor:
        """Mean decoded token of each image: uint8 [n, ..., M] -> float32 [n, C].

        Decoding is linear, so the pieces are averaged first, and the product is one of n rows.
        """
        learnt = self.on(codes.device)
        with _float32(codes.device):
            rows = codes.flatten(1, -2).int() + self._first_rows(codes.device)
            pieces = F.embedding(rows, learnt["centroids"].flatten(0, 1)).mean(1)
            return learnt["offset"] + pieces.flatten(1) @ learnt["inverse"]

    def _first_rows(self, device: torch.device) -> torch.Tensor:
        """Row of each group's first centroid in the list of all groups' centroids, int32 [M]."""
        return torch.arange(0, ENTRIES * self.groups, ENTRIES, dtype=torch.int32, device=device)

    @cached_property
    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each channel's peak, float32 [C], and the tables in units of it, float16 [M 256, C].

        float16 halves the memory traffic and with it the time.
        """
        tables = self.arrays["centroids"] @ self.arrays["inverse"].reshape(self.groups, self.width, -1)
        peaks = np.maximum(np.abs(tables).max((0, 1)), np.finfo(np.float32).tiny)
        return torch.from_numpy(peaks), torch.from_numpy((tables / peaks).astype(np.float16)).flatten(0, 1)


def _float32(device: torch.device) -> contextlib.AbstractContextManager:
    """Compute matrix products in float32 even under autocast (on CUDA in TF32, where that is allowed)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
