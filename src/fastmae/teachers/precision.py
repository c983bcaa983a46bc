"""The precision in which a teacher computes, and what each precision does to its tokens.

32-true      float32 throughout.
tf32         float32 with products of 10 bits of mantissa, on CUDA GPUs since Ampere.
bf16-mixed   matrix products and convolutions in bfloat16, sums over many numbers (norms, softmax) in float32.
16-mixed     the same in float16.

Tokens are float32 in any case. The names are those of the training commands; torch's autocast does the mixing.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F

from fastmae.runtime.arithmetic import float32_products

FULL_PRECISION = "32-true"
AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
MIN_COSINE = 0.999
"""Least mean cosine, to fp32's tokens, of the tokens of a precision that `--precision auto` takes."""
AMPERE = (8, 0)
"""First compute capability with TF32 and bfloat16."""


class MeasuredTeacher(Protocol):
    """What is needed of a `Teacher` here."""

    precision: str
    mean: torch.Tensor

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, K, S, S] -> float32 [B, grid, grid, C]."""
        ...


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """The context in which a teacher runs on a device. For 32-true and tf32, the caller's own autocast stays."""
    dtype = AUTOCAST_DTYPES.get(precision)
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
    with autocast, float32_products(device, tf32=precision != FULL_PRECISION):
        yield


def reduced_precisions(device: torch.device) -> list[str]:
    """The precisions below 32-true that a device has, in the order in which `auto` tries them.

    float16 comes last where there is a choice: a later image could exceed its range.
    """
    if device.type == "cuda":
        is_ampere = torch.cuda.get_device_capability(device) >= AMPERE
        return ["bf16-mixed", "tf32", "16-mixed"] if is_ampere else ["16-mixed"]
    return ["bf16-mixed"] if torch.amp.is_autocast_available(device.type) else []


def precision_cosines(teacher: MeasuredTeacher, pixels: torch.Tensor) -> dict[str, float]:
    """Mean cosine of the tokens in each of the `reduced_precisions` to those in fp32. The teacher's precision stays.

    Args:
        teacher: on its device.
        pixels: uint8 [n, K, S, S], on that device.

    Returns:
        The cosine by the precision's name. NaN where tokens are not finite.
    """
    before = teacher.precision
    try:
        exact = _tokens_in(teacher, FULL_PRECISION, pixels)
        return {
            name: mean_cosine(_tokens_in(teacher, name, pixels), exact) for name in reduced_precisions(pixels.device)
        }
    finally:
        teacher.precision = before


def mean_cosine(tokens: torch.Tensor, others: torch.Tensor) -> float:
    """Mean cosine similarity of float32 [..., C] and float32 [..., C]."""
    return float(F.cosine_similarity(tokens, others, dim=-1).mean())


def _tokens_in(teacher: MeasuredTeacher, precision: str, pixels: torch.Tensor) -> torch.Tensor:
    teacher.precision = precision
    return teacher(pixels)
