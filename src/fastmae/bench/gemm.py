"""For the GEMM share of `bench step`: a step's floating-point operations and the machine's rate of matrix products."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastmae.runtime.fast_linear import linear


def flops_of(work: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products, convolutions and attention, forward and backward."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    # torch's counter knows the attention kernels of GPUs only.
    cpu_attention: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        work()
    return int(counter.get_total_flops())


class BlockProducts:
    """The linear layers of one transformer block, forward and backward, on random operands. They are most of a step.

    The products have the sizes of the step at hand. The rate of one large square product would say less, because a
    library may be worse at that one.

    Args:
        batch: views per batch, B.
        tokens: tokens per view, n.
        width: width of the block, D.
        device: where the products are computed.
        dtype: dtype of the operands.

    Attributes:
        flops: floating-point operations of one run.
    """

    def __init__(self, batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        # Input and output channels of qkv, the attention's projection and the two layers of the MLP.
        layers = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        self.operands = [
            (
                random(batch, tokens, inputs).requires_grad_(),
                random(outputs, inputs).requires_grad_(),
                random(batch, tokens, outputs),
            )
            for inputs, outputs in layers
        ]
        # Forward, gradient of the tokens and gradient of the weight: a product each, with 12 D^2 weights in all.
        self.flops = 3 * 2 * batch * tokens * 12 * width**2

    def implementations(self) -> dict[str, Callable[[], None]]:
        """The same products computed by the student's linear layers and by torch's own."""
        return {"fastmae's": lambda: self._run(linear), "torch's own": lambda: self._run(F.linear)}

    def _run(self, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for tokens, weight, gradient in self.operands:
            torch.autograd.grad(compute(tokens, weight), (tokens, weight), gradient)
