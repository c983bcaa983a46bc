"""How a token's numbers lie on disk. A codec turns float32 tokens into what a shard keeps, and back."""

import numpy as np
import torch

from fastmae.errors import InputError

CODECS = {"fp16": torch.float16, "fp32": torch.float32}
"""Name -> dtype on disk. The paper's 0.94 TB for ImageNet is fp16 (Table 2)."""


def encode(tokens: torch.Tensor, codec: str) -> np.ndarray:
    """float32 tokens [n, grid, grid, C] -> the array that a shard keeps.

    Raises:
        InputError: tokens that are not finite, or beyond what fp16 can hold (65504).
    """
    if not torch.isfinite(tokens).all():
        raise InputError("the teacher's features hold NaN or infinity; check its weights file, or tap another --teacher-block")
    stored = tokens.to(CODECS[codec])
    if not torch.isfinite(stored).all():
        raise InputError(f"the teacher's features reach {tokens.abs().max():.0f}, beyond {codec}'s 65504; use --codec fp32")
    return stored.contiguous().numpy()
