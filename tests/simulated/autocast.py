"""Autocast on the simulated accelerator, by the rules that torch documents for CUDA."""

from typing import Any

import torch
from torch.utils._pytree import tree_map

aten = torch.ops.aten
KEY = torch._C.DispatchKey.AutocastPrivateUse1

IN_LOWER_PRECISION = """linear matmul mm bmm addmm baddbmm addbmm mv addmv conv1d conv2d conv3d convolution
    conv_transpose2d.input scaled_dot_product_attention prelu""".split()
IN_FP32 = """layer_norm native_layer_norm group_norm softmax.int log_softmax.int cross_entropy_loss nll_loss mse_loss
    l1_loss smooth_l1_loss cosine_similarity binary_cross_entropy_with_logits cdist exp log log2 log1p expm1
    pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor sum sum.dim_IntList prod cumsum cumprod norm.Scalar
    norm.ScalarOpt_dim linalg_vector_norm rsqrt reciprocal softplus""".split()


def register(device: str) -> list[torch.library.Library]:
    """Add the rules to torch. They hold as long as the returned libraries live."""
    fall_through, rules = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fall_through.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in IN_LOWER_PRECISION:
        rules.impl(name, _computed_in(name, device, None), "AutocastPrivateUse1")
    for name in IN_FP32:
        rules.impl(name, _computed_in(name, device, torch.float32), "AutocastPrivateUse1")
    return [fall_through, rules]


def _computed_in(name: str, device: str, dtype: torch.dtype | None) -> Any:
    """An operation whose floating-point inputs on the device are cast; None: to autocast's own dtype."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != device:
            return value
        if not value.is_floating_point() or value.dtype == torch.float64:
            return value
        return value.to(dtype or torch.get_autocast_dtype(device))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
            args, kwargs = tree_map(cast, (args, kwargs))
            return operation(*args, **kwargs)

    return kernel
