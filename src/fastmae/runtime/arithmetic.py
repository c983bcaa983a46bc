"""How a command computes: with TF32 or in full float32, and with deterministic algorithms or the fastest ones.

Both are states of the whole process in torch. Here they hold within a context and are restored after it, so that one
command says nothing about the next in the same process.
"""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from fastmae.config import Precision
from fastmae.errors import InputError
from fastmae.runtime.device import resolve_device

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The environment variable with which cuBLAS is deterministic, and the values that torch accepts. Torch reads it at
each matrix product."""
NO_DETERMINISTIC_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


class Asked(Protocol):
    """The options of a command that computes."""

    @property
    def device(self) -> str:
        """As `--device`."""

    @property
    def precision(self) -> Precision:
        """As `--precision`."""


Options = TypeVar("Options", bound=Asked)
P = ParamSpec("P")
Result = TypeVar("Result")


def computes_as_asked(function: Callable[Concatenate[Options, P], Result]) -> Callable[Concatenate[Options, P], Result]:
    """For a command whose first argument is its options: what `--precision` and `--deterministic` say about arithmetic.

    Only 32-true rules TF32 out. tf32 is named after it, and beside 16-bit floats it rounds less than they do.

    Raises:
        InputError: an unknown device; or an operation without a deterministic kernel.
    """

    @functools.wraps(function)
    def wrapped(config: Options, *args: P.args, **kwargs: P.kwargs) -> Result:
        tf32, deterministic = config.precision != "32-true", getattr(config, "deterministic", False)
        with float32_products(resolve_device(config.device), tf32), deterministic_kernels(deterministic):
            return function(config, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Whether float32 matrix products and convolutions on an NVIDIA GPU round their factors to TF32.

    TF32 has float32's range and 10 bits of mantissa instead of 23. GPUs before Ampere don't have it and compute in
    float32. Without a setting, torch uses TF32 for convolutions but not for matrix products. Nothing changes on other
    devices.

    Args:
        device: where the command computes.
        tf32: whether to round.
    """
    if device.type != "cuda":
        yield
        return
    products: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [_allows_tf32(kind) for kind in products]
    _allow_tf32(products, [tf32] * len(products))
    try:
        yield
    finally:
        _allow_tf32(products, before)


@contextlib.contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Have torch use only kernels that give the same bits for the same input, on the same device and versions.

    Attention too is then deterministic in its backward pass: torch takes the deterministic mode of its flash and
    memory-efficient kernels, and leaves cuDNN's out. It does not if missing kernels only warn.

    Args:
        enabled: False leaves everything as it is.

    Raises:
        InputError: an operation that has no such kernel was used.
    """
    if not enabled:
        yield
        return
    mode = torch.get_deterministic_debug_mode()  # 0: off; 1: missing kernels warn; 2: they are errors
    memory: Any = torch.utils.deterministic
    benchmark, fill = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    workspace = os.environ.get(WORKSPACE)
    if workspace not in WORKSPACES:
        os.environ[WORKSPACE] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    memory.fill_uninitialized_memory = False  # a kernel for each new tensor; ours are all written
    try:
        yield
    except RuntimeError as error:
        operation = NO_DETERMINISTIC_KERNEL.search(str(error))
        if operation is None:
            raise
        raise InputError(
            f"--deterministic: torch {torch.__version__} has no deterministic {operation[1]} on this device; "
            "leave --deterministic out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill
        if workspace is None:
            del os.environ[WORKSPACE]
        else:
            os.environ[WORKSPACE] = workspace


def _allows_tf32(kind: Any) -> bool:
    try:
        return bool(kind.allow_tf32)
    except RuntimeError:  # a script has used `fp32_precision`, which came with torch 2.9
        return kind.fp32_precision == "tf32"


def _allow_tf32(kinds: tuple[Any, ...], allowed: list[bool]) -> None:
    with warnings.catch_warnings():
        # `fp32_precision` is new in torch 2.9, and torch refuses to read `allow_tf32` once it was set, as Fabric does.
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        for kind, allow in zip(kinds, allowed, strict=True):
            kind.allow_tf32 = allow
