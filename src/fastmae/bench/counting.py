"""What a step does on a GPU, counted on any machine: kernels, memory traffic and floating-point operations.

The step runs on tensors without contents (torch's FakeTensor), and each operator that it calls is counted:

- kernels: one for an operator; none for a view or an allocation; three for the backward pass of attention; for an
  operator over lists of tensors as many as torch's multi-tensor kernels launch.
- bytes: those of all inputs and outputs, and of what is changed in place twice, as they come out of the device's
  memory and go into it. A copy does not read what it overwrites, a look-up reads what it returns, and attention's
  backward pass reads and writes everything twice.
- FLOPs: those of matrix products and attention, a multiplication with its addition as two.

Attention is counted as the fused kernel that GPUs have, whatever this machine has. The figures are a model: a GPU's
caches save traffic, and its kernels may be split.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
"""Operators that only allocate, and views that torch does not declare as such."""
OVERWRITING = ("copy_", "_foreach_copy_", "fill_", "zero_")
"""Operators that write their first argument without reading it."""
LOOK_UPS = ("index", "index_select", "embedding", "gather")
"""Operators that read no more of their first argument than they return."""
LIST_TENSORS = (110, 64, 48, 36, 30)
"""Most tensors that one multi-tensor kernel takes, by the number of lists (ATen/native/cuda/MultiTensorApply.cuh)."""
LIST_BLOCKS, LIST_CHUNK = 320, 65536
"""Most thread blocks of one multi-tensor kernel, and the numbers that each works on."""


@dataclass
class Counts(TorchDispatchMode):
    """Counts the operators that are called within its context.

    Attributes:
        kernels: by operator.
        bytes: by operator.
        flops: of all matrix products and attention.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flops: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        schema, name = func._schema, func._schema.name.partition("::")[2]
        is_view = not schema.is_mutable and all(value.alias_info is not None for value in schema.returns)
        computes = schema.is_mutable or bool(_tensors(outcome))
        if computes and not is_view and name not in FREE:
            kwargs = kwargs or {}
            # What an operator changes in place is read and written; what it returns then is the same tensor. A tensor
            # given as out= is only written.
            outs = {argument.name for argument in schema.arguments if argument.is_out}
            inputs = _tensors((args, [value for key, value in kwargs.items() if key not in outs]))
            launches = _launches(name, args)
            changed = [value for value, argument in zip(args, schema.arguments, strict=False) if _is_written(argument)]
            changed += [kwargs[key] for key in outs]
            written = _bytes_of(_tensors(changed if schema.is_mutable else outcome))
            if name in OVERWRITING:
                read = _bytes_of(_tensors(args[1:]))
            elif name in LOOK_UPS:
                read = min(_bytes_of(inputs[:1]), written) + _bytes_of(inputs[1:])
            else:
                read = _bytes_of(inputs)
            traffic = read + written
            self.add(name, launches, traffic, _product_flops(name, inputs))
        return outcome

    def add(self, name: str, kernels: int, num_bytes: int, flops: int) -> None:
        """Count an operator."""
        self.kernels[name] += kernels
        self.bytes[name] += num_bytes
        self.flops += flops


def count_step(run: Callable[[], object]) -> Counts:
    """Count a step that is built and has not run yet. It computes nothing and changes no weight.

    Args:
        run: takes the step.
    """
    # Tensors of this machine's CPU; all that the step does is decided by their dtypes and shapes.
    with FakeTensorMode(allow_non_fake_inputs=True):
        run()  # makes the optimizer's state
        counts = Counts()
        with _fused_attention(counts), counts:
            run()
    return counts


def _launches(name: str, args: Any) -> int:
    if name == "im2col":  # torch's launches a kernel an image
        return len(args[0])
    lists = [value for value in args if isinstance(value, list | tuple) and _tensors(value)]
    return list_kernels(lists) if name.startswith(("_foreach", "_fused")) else 1


def list_kernels(lists: list[Any]) -> int:
    """Kernels of an operator over lists of tensors, all of one length."""
    first = _tensors(lists[0])
    blocks = sum(math.ceil(tensor.numel() / LIST_CHUNK) for tensor in first)
    most_tensors = LIST_TENSORS[min(len(lists), len(LIST_TENSORS)) - 1]
    return max(1, math.ceil(len(first) / most_tensors), math.ceil(blocks / LIST_BLOCKS))


@contextmanager
def _fused_attention(counts: Counts) -> Iterator[None]:
    """Count attention as one fused kernel forward and three backward, with the layout of its results on a GPU."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(q, k, v)
            out = _tokens_first(q)
            counts.add("attention", 1, _bytes_of([q, k, v, out]), 4 * q.numel() * k.shape[2])
            return out

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v = ctx.saved_tensors
            traffic = 2 * (_bytes_of([q, k, v]) + _bytes_of([gradient]))
            counts.add("attention_backward", 3, traffic, 10 * q.numel() * k.shape[2])
            return _tokens_first(q), _tokens_first(k), _tokens_first(v)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        return Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype))

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """An empty [B, heads, N, d] whose memory is [B, N, heads, d], as fused kernels give it."""
    batch, heads, tokens, width = tensor.shape
    return tensor.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    """Bytes in memory of different tensors; what an expanded dimension repeats counts once."""
    return sum(
        _elements(tensor) * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )


def _elements(tensor: torch.Tensor) -> int:
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _product_flops(name: str, inputs: list[torch.Tensor]) -> int:
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return 0
    left, right = inputs[-2:]
    return 2 * left.numel() * right.shape[-1]
