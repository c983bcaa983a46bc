"""`fastmae bench step --count`: what the steps of all rows do on a GPU, counted on any machine (`counting`)."""

import logging
from dataclasses import replace
from typing import Any

from fastmae.bench.counting import Counts, count_step
from fastmae.bench.methods import Method, Steps, methods
from fastmae.bench.table import Table, machine
from fastmae.config import BenchStepConfig
from fastmae.runtime.progress import counted_through
from fastmae.runtime.wording import counted

log = logging.getLogger(__name__)

BATCH_SIZE = 1024
"""Views of a counted step, unless --batch-size is given: the weights' share of the traffic depends on it."""
SHOWN_OPERATORS = 4

NOTES = (
    "Counted on tensors without contents, as a GPU would run the step in eager mode: kernels of a step; memory traffic "
    "and floating-point operations of a view. Every operator reads its inputs from the device's memory and writes its "
    "outputs there, attention is one fused kernel forward and three backward. The optimizer and the norm of the "
    "gradients are part of the step.",
    "operators: those with the most traffic.",
)


def count_steps(config: BenchStepConfig) -> dict[str, Any]:
    """Count all rows and publish the table.

    Returns:
        The command's JSON: a row for each method; and the `kernels`, `bytes_per_image` and `flops_per_image` of the
        first row that is FastMAE's.
    """
    precision = "bf16-mixed" if config.precision == "auto" else config.precision
    batch_size = config.batch_size or BATCH_SIZE
    steps = Steps.launched(replace(config, device="cpu", precision=precision, batch_size=batch_size, compile=False))
    table_methods = methods(config)
    rows = []
    for method in counted_through(table_methods, "count", "rows", len(table_methods)):
        log.info(f"counting {method.name}")
        rows.append(_row(method, count_step(steps.step(method).run), batch_size))
    settings = machine() | {
        "counted as": f"a GPU in {precision}",
        "encoder": config.encoder,
        "sizes": f"views of {config.image_size} px, patches of {config.patch_size}",
        "batch": counted(batch_size, "view"),
    }
    Table("What a pre-training step does", settings, [_cells(row) for row in rows], NOTES).publish(config.out)
    ours = next((row for row, method in zip(rows, table_methods, strict=True) if method.objective == "paper"), rows[0])
    totals = {name: ours[name] for name in ("kernels", "bytes_per_image", "flops_per_image")}
    return {"rows": rows, **totals, "settings": settings}


def _row(method: Method, counts: Counts, batch_size: int) -> dict[str, Any]:
    return {
        "method": method.name,
        "kernels": sum(counts.kernels.values()),
        "bytes_per_image": round(sum(counts.bytes.values()) / batch_size),
        "flops_per_image": round(counts.flops / batch_size),
        "operators": [
            {"operator": name, "kernels": counts.kernels[name], "bytes_per_image": round(traffic / batch_size)}
            for name, traffic in counts.bytes.most_common()
        ],
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    largest = [
        f"{entry['operator']} {entry['kernels']} x, {entry['bytes_per_image'] / 1e6:.1f} MB"
        for entry in row["operators"][:SHOWN_OPERATORS]
    ]
    return {
        "method": row["method"],
        "kernels": str(row["kernels"]),
        "MB per view": f"{row['bytes_per_image'] / 1e6:.1f}",
        "GFLOP per view": f"{row['flops_per_image'] / 1e9:.2f}",
        "operators": "; ".join(largest),
    }
