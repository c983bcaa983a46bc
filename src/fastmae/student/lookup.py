"""Rows that tokens look up in a table, written to where they are needed instead of being copied there.

What a patch has by its position alone is a row of a small table, the same in every view: its position embedding, and in
the decoder the mask token there with its query, key and value. torch.compile joins such work by itself.

Shapes: B views, V visible tokens, M masked ones, U tokens that are left out, N rows of a table, D and W widths.
"""

from typing import Any

import torch
import torch.nn.functional as F

from fastmae.runtime.fast_linear import is_faster_as_convolution, linear
from fastmae.runtime.low_precision import autocast_dtype


def linear_plus_rows(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """A linear layer's output plus a row of a table for each token: the product is added to the rows where they lie.

    The bias is added to the table. So the output is read and written once, not twice.

    Args:
        tokens: [B, V, D].
        weight: [W, D].
        bias: [W].
        table: [N, W].
        ids: int64 [B, V], rows of the table.

    Returns:
        [B, V, W].
    """
    if torch.compiler.is_compiling() or is_faster_as_convolution(tokens, weight):
        output = linear(tokens, weight, bias)
        return output + F.embedding(ids, table.to(output.dtype))
    dtype = autocast_dtype(weight)
    operands = tokens.flatten(0, 1).to(dtype), weight.to(dtype)
    rows: torch.Tensor = _LinearPlusRows.apply(*operands, bias, table, ids.flatten())
    return rows.unflatten(0, ids.shape)


def keys_and_values(
    visible: torch.Tensor, table: torch.Tensor, ids_mask: torch.Tensor, unseen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of visible tokens, and after them those of masked patches, which are rows of a table.

    Args:
        visible: [B, U + V, 2 W], the keys beside the values.
        table: [N, 2 W], likewise; W is a multiple of 4.
        ids_mask: int64 [B, M], rows of the table.
        unseen: U, the number of leading tokens to leave out.

    Returns:
        Keys and values, each [B, V + M, W].
    """
    if torch.compiler.is_compiling():
        joined = torch.cat([visible[:, unseen:], F.embedding(ids_mask, table)], dim=1)
        keys, values = joined.chunk(2, dim=2)
    else:
        keys, values = _KeysAndValues.apply(visible, table, ids_mask, unseen)
    return keys, values


class _LinearPlusRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, weight, ids)
        ctx.num_rows = len(table)
        rows = F.embedding(ids, (table if bias is None else table + bias).to(tokens.dtype))
        return torch.addmm(rows, tokens, weight.t(), out=rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, weight, ids = ctx.saved_tensors
        needs_tokens, needs_weight, needs_bias, needs_table, _ = ctx.needs_input_grad
        of_table = _table_gradient(gradient, ids, ctx.num_rows) if needs_table else None
        return (
            gradient @ weight if needs_tokens else None,
            gradient.t() @ tokens if needs_weight else None,
            (gradient if of_table is None else of_table).sum(0) if needs_bias else None,
            of_table,
            None,
        )


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, visible: torch.Tensor, table: torch.Tensor, ids_mask: torch.Tensor, unseen: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(ids_mask)
        ctx.unseen, ctx.num_rows = unseen, len(table)
        seen = visible[:, unseen:]
        batch, num_seen, width = seen.shape
        joined = visible.new_empty(batch, num_seen + ids_mask.shape[1], width)
        joined[:, :num_seen] = seen
        # Rows are moved as 8-byte numbers: torch's indexing takes its time by the number, not by the byte.
        rows, wide = joined[:, num_seen:].view(torch.int64), table.contiguous().view(torch.int64)
        torch.ops.aten.index.Tensor_out(wide, [ids_mask], out=rows)
        return joined.chunk(2, dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids_mask,) = ctx.saved_tensors
        batch, num_tokens, width = gradients[0].shape
        num_seen = num_tokens - ids_mask.shape[1]
        of_visible = gradients[0].new_empty(batch, ctx.unseen + num_seen, 2, width)
        of_visible[:, : ctx.unseen] = 0
        torch.stack([each[:, :num_seen] for each in gradients], dim=2, out=of_visible[:, ctx.unseen :])
        # An index of their own passes over the visible tokens. To cut them off would copy the masked ones.
        ids = F.pad(ids_mask, (num_seen, 0), value=ctx.num_rows)
        of_table = [_table_gradient(each, ids, ctx.num_rows) for each in gradients]
        return of_visible.flatten(2), torch.cat(of_table, dim=1), None, None


def _table_gradient(gradient: torch.Tensor, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The sum of the gradients [..., W] that belong to each row of a table, [N, W]; an index of N stands for no row."""
    of_rows = torch.ops.aten.embedding_dense_backward(gradient, ids, num_rows + 1, num_rows, False)
    return of_rows[:num_rows]
