"""What a step's matrix products would take by themselves: their number, and the rate at which this machine does such products."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastmae.runtime.fast_linear import linear


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products, convolutions and attentions of a work, backward passes included."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    on_a_cpu: dict[Any, Any] = {  # the counter knows attention on GPUs alone
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_a_cpu) as counter:
        work()
    return int(counter.get_total_flops())


class BlockProducts:
    """The linear layers of one transformer block, forward and backward, on operands that lie ready. Most of a step is these.

    They have the sizes of the step at hand: the rate of one large square product says less, since a library may do that one worse.

    Args:
        batch: B.
        tokens: of a view.
        width: of the block.
        device: where.
        dtype: of the products.
    """

    def __init__(self, batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype):
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        self.operands = [
            (
                draw(batch, tokens, inputs).requires_grad_(),
                draw(outputs, inputs).requires_grad_(),
                draw(batch, tokens, outputs),
            )
            for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        ]
        self.flops = 3 * 2 * batch * tokens * 12 * width**2

    def ways(self) -> dict[str, Callable[[], None]]:
        """All of them, computed as the student computes its layers, or as torch does by itself."""
        return {"fastmae's": lambda: self._run(linear), "torch's own": lambda: self._run(F.linear)}

    def _run(self, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for tokens, weight, gradient in self.operands:
            torch.autograd.grad(compute(tokens, weight), (tokens, weight), gradient)
