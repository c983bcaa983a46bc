"""Mean and standard deviation of a store's tokens and pixels (statistics.safetensors), from the sums in its shards."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastmae.errors import InputError
from fastmae.tokens.codec import LARGEST_TOKEN
from fastmae.tokens.format import StoreInfo
from fastmae.tokens.tensor_file import WAY_OUT, load_tensors

SUMS = ("channel_sums", "pixel_sums")
"""Tensors of a shard with the sums from which the store's statistics are computed."""
TOLERANCE = 1e-3
"""How far a statistic may be from what the shards say, in standard deviations or, where these are less, in means."""


def no_sums(info: StoreInfo) -> dict[str, np.ndarray]:
    """`SUMS` over no images."""
    return {"channel_sums": np.zeros((2, info.token_dim)), "pixel_sums": np.zeros((2, info.channels))}


def added(total: Mapping[str, np.ndarray], more: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`SUMS` over the images of both."""
    with np.errstate(all="ignore"):  # sums that were changed by hand can be anything
        return {name: total[name] + more[name] for name in SUMS}


def statistics_of(info: StoreInfo, sums: Mapping[str, np.ndarray], decoded: int) -> dict[str, np.ndarray]:
    """The statistics of a store.

    Args:
        info: what the store holds.
        sums: `SUMS`, each the sum of all shards': sum and sum of squares of each channel, float64 [2, C] and [2, K].
        decoded: images that they were taken over.

    Returns:
        `mean` and `std`, float32 [C]; `pixel_mean` and `pixel_std`, float32 [K].
    """
    tokens = _mean_and_std("", sums["channel_sums"], decoded * info.grid**2)
    return tokens | _mean_and_std("pixel_", sums["pixel_sums"], decoded * info.middle_size**2)


def read_statistics(file: Path, info: StoreInfo) -> dict[str, torch.Tensor]:
    """The statistics that a file holds, as `statistics_of` returns them.

    Raises:
        InputError: missing or damaged, or numbers that no tokens or pixels can have.
    """
    tokens, pixels = (info.token_dim,), (info.channels,)
    arrays = load_tensors(file, {"mean": tokens, "std": tokens, "pixel_mean": pixels, "pixel_std": pixels})
    for name, array in arrays.items():
        largest = 1 if name.startswith("pixel") else LARGEST_TOKEN
        smallest = -LARGEST_TOKEN if name == "mean" else 0
        if not ((array >= smallest) & (array <= largest)).all():  # NaN is neither
            raise InputError(f"{file}: '{name}' holds impossible numbers; {WAY_OUT}")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def are_close(stored: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> bool:
    """Whether stored statistics are those that the shards' sums give, up to rounding."""
    for prefix in ("", "pixel_"):
        mean, std = expected[f"{prefix}mean"], expected[f"{prefix}std"]
        slack = TOLERANCE * np.maximum(std, np.abs(mean)) + np.finfo(np.float32).tiny
        for name, value in ((f"{prefix}mean", mean), (f"{prefix}std", std)):
            if not (np.abs(stored[name].numpy() - value) <= slack).all():
                return False
    return True


def _mean_and_std(prefix: str, sums: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Mean and std, float32 [C], from the sum and the sum of squares, float64 [2, C], of `count` values."""
    with np.errstate(all="ignore"):  # as in `added`
        mean = sums[0] / count
        variance = np.maximum(sums[1] / count - mean**2, 0.0)
        return {f"{prefix}mean": mean.astype(np.float32), f"{prefix}std": np.sqrt(variance).astype(np.float32)}
