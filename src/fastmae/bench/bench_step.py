"""`fastmae bench step`: time and memory of a pre-training step: FastMAE, MAE and online teachers (Table 2, Fig. 2).

Beyond the table, it times the step without a decoder, and plain distillation with and without a teacher in memory.

A step is forward, loss, backward and optimizer, run by the code of `pretrain` on a batch that is already on the device.
Loading is measured by `bench loader`. All rows take turns in one process, so a slow spell of the machine hits all of
them alike. Memory is measured before that, for each row in a process of its own.

The GEMM share says how close a row comes to the speed of bare matrix products (GEMMs) on the same machine:

    GEMM share = GEMM seconds of the step / seconds of the step
    GEMM seconds of the step = floating-point operations of the step / fastest GEMM rate

GEMM seconds are the time that the step's arithmetic would take if all of it ran at the fastest GEMM rate. A share of 1
therefore means that the step is as fast as this machine's matrix products. The gap to 1 is time spent on other work
(softmax, norms, optimizer, moving memory) and on products that run slower than the fastest ones.

The fastest GEMM rate, in FLOP/s, is measured and not taken from a data sheet. In every round the linear layers of one
transformer block alone run forward and backward at the step's own sizes (`gemm.BlockProducts`), in four variants: the
encoder's block and the decoder's block, each with the student's linear layers and with torch's own. The variant with
the highest median rate counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch

from fastmae.bench.gemm import BlockProducts, flops_of
from fastmae.bench.memory import FreshProcesses, peak_memory_of
from fastmae.bench.methods import BEYOND_PAPER, MAE, PUBLISHED, Method, Step, Steps, methods
from fastmae.bench.sample import IMAGENET_IMAGES
from fastmae.bench.step_counts import count_steps
from fastmae.bench.table import Table, machine
from fastmae.bench.timing import Timetable, format_rate, interleave, same_every_round, seconds_of
from fastmae.config import BenchStepConfig
from fastmae.runtime.arithmetic import computes_as_asked
from fastmae.runtime.device import device_name, memory_hint
from fastmae.runtime.progress import Progress, counted_through
from fastmae.runtime.wording import counted

FP16_BYTES = 2
"""Bytes of a stored number, as in Table 2."""
MEMORY_STEPS = 2
"""Steps after which memory is read: the optimizer's state exists from the second one on."""

NOTES = (
    "In every round each row makes one step in turn; the median over the rounds is given with the fastest and the "
    "slowest. A step is forward, loss, backward and optimizer, on a batch of noise that is already on the device.",
    "'MAE' is `pretrain --target pixels`. It computes the published function (tests compare output, loss and "
    "gradients) with the optimisations of FastMAE's rows: fused attention and AdamW, only visible patches embedded, "
    "the last block for masked patches alone. 'MAE, as published' computes as its authors' code does.",
    "Offline rows decode and normalise stored tokens. The online rows run the teacher instead, and crop and normalise "
    "its output. Teachers have random weights. 'x offline' compares an online row with the same one offline.",
    "'visible patches alone' has no decoder and is not in the paper: its loss is on the last layer, as in the recipe "
    f"{BEYOND_PAPER}. 'distillation' is the same with nothing masked.",
    "GEMM share: the time that the row's floating-point operations would take at the fastest rate of matrix products, "
    "divided by the time that the step took. The rate is that of the linear layers of one block alone, forward and "
    "backward, at the step's own sizes and in the same rounds; the settings list all rates measured.",
    "Memory: on a GPU, the most that torch allocated; on a CPU, the most that a fresh process held beyond its "
    "libraries. Disk: fp16 tokens of the whole middle image. The paper's figures are from a V100 with ViT-B students.",
)


@dataclass(frozen=True)
class StepMeasurement:
    """What was measured of one row.

    Attributes:
        seconds: seconds of its step, one per round.
        flops: floating-point operations of a step.
        step: the step.
        memory: peak memory in MB.
    """

    seconds: list[float]
    flops: int
    step: Step
    memory: float


@computes_as_asked
def bench_step(config: BenchStepConfig) -> dict[str, Any]:
    """Measure all rows, or count what they do, and publish the table.

    Returns:
        The command's JSON.
    """
    if config.count:
        return count_steps(config)
    table_methods = methods(config)
    steps = Steps.launched(config)
    products = steps.products()
    with memory_hint("give a smaller --batch-size or fewer --rows"):
        memory, expected = _measure_memory(config, table_methods)
        measurements, gemm_rates = _measure(table_methods, steps, products, memory, expected)
    gemm_rate = max(gemm_rates.values())
    rows = [_row(method, measurements[method.name], gemm_rate, steps) for method in table_methods]
    _add_ratios(rows, table_methods)
    settings = machine() | _settings(config, steps, gemm_rates)
    Table("A pre-training step", settings, [_cells(row) for row in rows], NOTES).publish(config.out)
    return {"rows": rows, "gemm_gflops_per_second": round(gemm_rate / 1e9, 1), "settings": settings}


def _measure_memory(config: BenchStepConfig, table_methods: list[Method]) -> tuple[dict[str, float], dict[str, float]]:
    """The peak memory of each row in MB, and the seconds of its second step, by which the bench's time is foreseen."""
    processes = FreshProcesses(__name__)
    memory: dict[str, float] = {}
    seconds: dict[str, float] = {}
    timetable = Timetable({method.name: 1 for method in table_methods})
    steps_to_come = len(table_methods) * (1 + config.warmup + config.rounds)
    with Progress("bench step, memory", "rows", len(table_methods)) as progress:
        for method in table_methods:
            left = timetable.seconds_left()
            progress.expect(None if left is None else left + steps_to_come * fmean(seconds.values()))
            progress.now(method.name + ("" if left is None else "; the time left is that of the whole bench"))
            with timetable.turn(method.name):
                memory[method.name], seconds[method.name] = processes.run(step_memory, config, method)
            progress.advance(1)
    return memory, seconds


def step_memory(config: BenchStepConfig, method: Method) -> tuple[float, float]:
    """The peak memory of a row in MB, and the seconds of its last step. To be called in a process that has computed
    nothing yet.
    """
    steps, seconds = Steps.launched(config), 0.0

    def work() -> None:
        nonlocal seconds
        step = steps.step(method)
        for _ in range(MEMORY_STEPS):
            seconds = seconds_of(step.run, steps.fabric.device)

    return peak_memory_of(work, steps.fabric.device), seconds


def _measure(
    table_methods: list[Method],
    steps: Steps,
    products: dict[str, BlockProducts],
    memory: dict[str, float],
    expected: dict[str, float],
) -> tuple[dict[str, StepMeasurement], dict[str, float]]:
    """Time all steps and matrix products side by side.

    Returns:
        The measurement of each row by its method, and the rate of each variant of the products in FLOP/s.
    """
    built_steps = {method.name: steps.step(method) for method in table_methods}
    named_steps = counted_through(built_steps.items(), "bench step, count operations", "rows", len(built_steps))
    step_flops = {name: flops_of(step.run) for name, step in named_steps}
    product_flops: dict[str, int] = {}
    works: dict[str, Callable[[], object]] = {name: step.run for name, step in built_steps.items()}
    for block, block_products in products.items():
        for implementation, run in block_products.implementations().items():
            variant = f"{implementation} in the {block}"
            product_flops[variant], works[variant] = block_products.flops, run
    seconds = _time_in_turn(works, steps, expected)
    measurements = {
        name: StepMeasurement(seconds[name], step_flops[name], step, memory[name]) for name, step in built_steps.items()
    }
    return measurements, {variant: flops / median(seconds[variant]) for variant, flops in product_flops.items()}


def _time_in_turn(
    works: dict[str, Callable[[], object]], steps: Steps, expected: dict[str, float]
) -> dict[str, list[float]]:
    """The seconds of each piece of work, one per round."""
    clock = time.process_time if _on_one_thread(steps) else time.perf_counter
    further_rounds = steps.config.warmup - 1  # `interleave` adds a last round of warm-up
    warming_up = [work for work in works.values() for _ in range(further_rounds)]
    for work in counted_through(warming_up, "bench step, warm up", "turns", len(warming_up)):
        work()
    timed = partial(same_every_round, device=steps.fabric.device, clock=clock)
    turns = {name: timed(work) for name, work in works.items()}
    return interleave(turns, steps.config.rounds, "bench step", expected)


def _on_one_thread(steps: Steps) -> bool:
    """Whether all work is done by this process's one thread, so that its CPU time is the time of the step."""
    return steps.fabric.device.type == "cpu" and torch.get_num_threads() == 1


def _row(method: Method, measurement: StepMeasurement, gemm_rate: float, steps: Steps) -> dict[str, Any]:
    """A row of the command's JSON, except for the ratios to other rows. `gemm_rate` is in FLOP/s."""
    seconds, flops = median(measurement.seconds), measurement.flops
    grid = steps.config.middle_size // steps.config.patch_size
    token_bytes = grid**2 * method.channels * FP16_BYTES if method.target == "tokens" else 0
    return {
        "method": method.name,
        "seconds": round(seconds, 4),
        "seconds_min": round(min(measurement.seconds), 4),
        "seconds_max": round(max(measurement.seconds), 4),
        "images_per_second": round(steps.batch_size / seconds, 2),
        "memory_mb": round(measurement.memory),
        "gemm_share": round(flops / gemm_rate / seconds, 3),
        "gflops": round(flops / 1e9, 4),
        "parameters_millions": round(measurement.step.parameters / 1e6, 1),
        "mask_ratio": measurement.step.mask_ratio,
        "loss_terms": measurement.step.loss_terms,
        "token_bytes_per_image": token_bytes,
        "imagenet_tb": round(token_bytes * IMAGENET_IMAGES / 1e12, 2),
        "paper_seconds": method.paper[0] if method.paper else None,
        "paper_memory_mb": method.paper[1] if method.paper else None,
    }


def _add_ratios(rows: list[dict[str, Any]], table_methods: list[Method]) -> None:
    """Add how many times as fast each row is as both of MAE's, and how many times as long online takes as offline.

    A ratio to a row that was not measured is None.
    """
    seconds = {row["method"]: row["seconds"] for row in rows}
    offline = {
        (method.teacher, method.objective): seconds[method.name]
        for method in table_methods
        if method.target == "tokens"
    }
    for row, method in zip(rows, table_methods, strict=True):
        own = row["seconds"]
        stored = offline.get((method.teacher, method.objective)) if method.target == "teacher" else None
        row["times_mae"] = round(seconds[MAE] / own, 2) if MAE in seconds else None
        row["times_published_mae"] = round(seconds[PUBLISHED] / own, 2) if PUBLISHED in seconds else None
        row["online_over_offline"] = round(own / stored, 2) if stored else None


def _settings(config: BenchStepConfig, steps: Steps, gemm_rates: dict[str, float]) -> dict[str, str]:
    device = steps.fabric.device
    sizes = {"width": config.encoder_width, "depth": config.encoder_depth, "heads": config.encoder_heads}
    changed_sizes = "".join(f", {name} {value}" for name, value in sizes.items() if value)
    teacher_input = {
        "view": f"the view, {config.image_size} px",
        "middle": f"the middle image, {config.middle_size} px",
    }
    return {
        "device": device_name(device),
        "threads": f"{torch.get_num_threads()}{'; seconds are CPU time' if _on_one_thread(steps) else ''}",
        "precision": steps.precision,
        "encoder": f"{config.encoder}{changed_sizes}",
        "sizes": f"views of {config.image_size} px, patches of {config.patch_size}",
        "batch": counted(steps.batch_size, "view"),
        "online teachers see": teacher_input[config.online],
        "matrix products": ", ".join(f"{rate / 1e9:.0f} GFLOP/s {variant}" for variant, rate in gemm_rates.items()),
        "rounds": str(config.rounds),
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def or_dash(value: float | None, form: str) -> str:
        return f"{value:{form}}" if value else "-"

    return {
        "method": row["method"],
        "loss terms": row["loss_terms"],
        "masked": f"{row['mask_ratio']:.0%}",
        "s": f"{row['seconds']:.3f}",
        "min-max": f"{row['seconds_min']:.3f}-{row['seconds_max']:.3f}",
        "images/s": format_rate(row["images_per_second"]),
        "x MAE": or_dash(row["times_mae"], ".2f"),
        "x published": or_dash(row["times_published_mae"], ".2f"),
        "x offline": or_dash(row["online_over_offline"], ".2f"),
        "memory MB": str(row["memory_mb"]),
        "GFLOP": f"{row['gflops']:.0f}",
        "GEMM share": f"{row['gemm_share']:.2f}",
        "M parameters": f"{row['parameters_millions']:.1f}",
        "kB per image": or_dash(row["token_bytes_per_image"] / 1000, ".0f"),
        "ImageNet TB": or_dash(row["imagenet_tb"], ".2f"),
        "paper s": or_dash(row["paper_seconds"], ".2f"),
        "paper MB": or_dash(row["paper_memory_mb"], ".0f"),
    }
