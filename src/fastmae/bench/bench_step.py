"""`fastmae bench step`: a pre-training step of FastMAE beside MAE's and beside online teachers', on this machine (Table 2, Fig. 2).

A step is forward, loss, backward and optimizer on a batch that lies ready, by the code that `pretrain` runs; loading is `bench loader`'s.
All rows take turns in one process, so that a slow spell of the machine falls on all of them. Memory is measured beforehand, each row in
a process of its own.

A row's GEMM share says how near it is to the machine's limit: the seconds that its floating-point operations would take at the machine's
rate of matrix products, over those that it took. The rate is that of a block's linear layers alone, forward and backward, at the step's own
sizes, timed in the same rounds (`gemm.BlockProducts`): of the encoder's or the decoder's, as the student computes them or as torch does by
itself, whichever is the fastest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fastmae.bench.gemm import BlockProducts, flops_of
from fastmae.bench.memory import FreshProcesses, peak_of
from fastmae.bench.methods import MAE, PUBLISHED, Method, Steps, methods
from fastmae.bench.sample import check_patches
from fastmae.bench.table import Table, check_out, machine
from fastmae.bench.timing import check_positive, figure, interleave
from fastmae.config import BenchStepConfig, PretrainConfig
from fastmae.errors import InputError
from fastmae.runtime.device import memory_hint

IMAGENET = 1281167
"""Images of ImageNet-1k's training set."""
TOKEN_BYTES = 2
"""fp16's, of a channel."""
MEMORY_STEPS = 2
"""From the second on, the optimizer's state is there too."""

NOTES = (
    "Every round each row makes one step, in turn; the median over the rounds is given with the fastest and the slowest. A step is "
    "forward, loss, backward and optimizer, on a batch of noise that lies ready on the device.",
    "'MAE' is `pretrain --target pixels`: the published function (tests compare output, loss and gradients), written as well as "
    "FastMAE's rows: fused attention and AdamW, only visible patches embedded, the last block for masked patches alone. "
    "'MAE, as published' computes as its authors' code does.",
    "FastMAE's offline rows decode and normalise the stored tokens; the online ones run the teacher instead, and cut and normalise what "
    "it gives. Teachers are at random.",
    "GEMM share: the seconds that the row's floating-point operations would take at the fastest rate of a block's linear layers alone "
    "(forward and backward, at the step's own sizes, in the same rounds; the settings list them), over those that it took.",
    "Memory: the most that torch allocated on the GPU; on a CPU, the most that a fresh process held beyond its libraries. Disk: tokens "
    "in fp16 of the whole middle image. The paper's figures are of a V100, with ViT-B students.",
)


@dataclass(frozen=True)
class Measured:
    """What was found of one row.

    Attributes:
        seconds: of its step, in each round.
        flops: of its step.
        parameters: trained ones.
        memory: megabytes at most.
    """

    seconds: list[float]
    flops: int
    parameters: int
    memory: float


def bench_step(config: BenchStepConfig) -> dict[str, Any]:
    """Measure, print the table; the command's JSON."""
    _check(config)
    rows = methods(config)
    steps = Steps.launched(config)
    products = steps.products()
    with memory_hint("give a smaller --batch-size"):
        memory = _memory(config, rows)
        measured, rates = _measure(rows, steps, products, memory)
    limit = max(rates.values())
    found = [_row(method, measured[method.name], limit, steps) for method in rows]
    _compare(found, rows)
    settings = machine() | _settings(config, steps, rates)
    Table("A pre-training step", settings, [_shown(row) for row in found], NOTES).publish(config.out)
    return {"rows": found, "gemm_gflops_per_second": round(limit / 1e9, 1), "settings": settings}


def _check(config: BenchStepConfig) -> None:
    check_positive(rounds=config.rounds, warmup=config.warmup)
    for name in ("batch_size", "threads"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: give 0 or more")
    check_patches(config.patch_size, image_size=config.image_size, middle_size=config.middle_size)
    if config.image_size > config.middle_size:
        raise InputError(
            f"--image-size {config.image_size}: larger than --middle-size {config.middle_size}, out of which views are cut"
        )
    check_out(config.out)


def _memory(config: BenchStepConfig, rows: list[Method]) -> dict[str, float]:
    processes = FreshProcesses(__name__)
    return {method.name: processes.run(memory_of, config, method) for method in rows}


def memory_of(config: BenchStepConfig, method: Method) -> float:
    """Megabytes that a row takes in this process, which has computed nothing yet."""
    steps = Steps.launched(config)

    def work() -> None:
        step = steps.step(method)
        for _ in range(MEMORY_STEPS):
            step.run()

    return peak_of(work, steps.fabric.device)


def _measure(
    rows: list[Method], steps: Steps, products: dict[str, BlockProducts], memory: dict[str, float]
) -> tuple[dict[str, Measured], dict[str, float]]:
    """Of each row what was found, and the rate of each block's products, done either way."""
    built = {method.name: steps.step(method) for method in rows}
    flops = {name: flops_of(step.run) for name, step in built.items()}
    in_turn = {
        f"{way} in the {name}": (made.flops, work)
        for name, made in products.items()
        for way, work in made.ways().items()
    }
    seconds = _take_turns(
        {name: step.run for name, step in built.items()} | {name: work for name, (_, work) in in_turn.items()}, steps
    )
    rates = {name: count / median(seconds[name]) for name, (count, _) in in_turn.items()}
    return {
        name: Measured(seconds[name], flops[name], step.parameters, memory[name]) for name, step in built.items()
    }, rates


def _take_turns(works: dict[str, Callable[[], None]], steps: Steps) -> dict[str, list[float]]:
    """Seconds of each work in each round."""
    clock = time.process_time if _on_one_thread(steps) else time.perf_counter

    def timed(work: Callable[[], None]) -> Callable[[int], float]:
        def seconds(_: int) -> float:
            begun = clock()
            work()
            if steps.fabric.device.type == "cuda":
                torch.cuda.synchronize(steps.fabric.device)
            return clock() - begun

        return seconds

    for work in works.values():
        for _ in range(steps.config.warmup - 1):  # `interleave` warms up once more
            work()
    return interleave({name: timed(work) for name, work in works.items()}, steps.config.rounds)


def _on_one_thread(steps: Steps) -> bool:
    return steps.fabric.device.type == "cpu" and torch.get_num_threads() == 1


def _row(method: Method, measured: Measured, limit: float, steps: Steps) -> dict[str, Any]:
    took, flops = measured.seconds, measured.flops
    grid = steps.config.middle_size // steps.config.patch_size
    disk = grid**2 * method.channels * TOKEN_BYTES if method.target == "tokens" else 0
    return {
        "method": method.name,
        "seconds": round(median(took), 4),
        "seconds_min": round(min(took), 4),
        "seconds_max": round(max(took), 4),
        "images_per_second": round(steps.batch_size / median(took), 2),
        "memory_mb": round(measured.memory),
        "gemm_share": round(flops / limit / median(took), 3),
        "gflops": round(flops / 1e9, 1),
        "parameters_millions": round(measured.parameters / 1e6, 1),
        "token_bytes_per_image": disk,
        "imagenet_tb": round(disk * IMAGENET / 1e12, 2),
        "paper_seconds": method.paper[0] if method.paper else None,
        "paper_memory_mb": method.paper[1] if method.paper else None,
    }


def _compare(found: list[dict[str, Any]], rows: list[Method]) -> None:
    """Add how many times as fast each row is as MAE, the published and ours, and an online row as its offline one."""
    by_name = {row["method"]: row for row in found}
    offline = {method.teacher: by_name[method.name] for method in rows if method.target == "tokens"}
    for row, method in zip(found, rows, strict=True):
        row["times_mae"] = round(by_name[MAE]["seconds"] / row["seconds"], 2)
        row["times_published_mae"] = round(by_name[PUBLISHED]["seconds"] / row["seconds"], 2)
        row["online_over_offline"] = (
            round(row["seconds"] / offline[method.teacher]["seconds"], 2) if method.target == "teacher" else None
        )


def _settings(config: BenchStepConfig, steps: Steps, rates: dict[str, float]) -> dict[str, str]:
    device = steps.fabric.device
    sizes = {name: getattr(config, f"encoder_{name}") for name in ("width", "depth", "heads")}
    changed = "".join(f", {name} {value}" for name, value in sizes.items() if value)
    seen = {"view": f"the view, {config.image_size} px", "middle": f"the middle image, {config.middle_size} px"}[
        config.online
    ]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": f"{torch.get_num_threads()}{'; seconds are CPU time' if _on_one_thread(steps) else ''}",
        "precision": steps.precision,
        "encoder": f"{config.encoder}{changed}",
        "sizes": f"views of {config.image_size} px, patches of {config.patch_size}, {PretrainConfig.mask_ratio:.0%} masked",
        "batch": f"{steps.batch_size} views",
        "online teachers see": seen,
        "matrix products": ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in rates.items()),
        "rounds": str(config.rounds),
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    def or_dash(value: float | None, form: str) -> str:
        return f"{value:{form}}" if value else "-"

    return {
        "method": row["method"],
        "s": f"{row['seconds']:.3f}",
        "min-max": f"{row['seconds_min']:.3f}-{row['seconds_max']:.3f}",
        "images/s": figure(row["images_per_second"]),
        "x MAE": f"{row['times_mae']:.2f}",
        "x published": f"{row['times_published_mae']:.2f}",
        "x offline": or_dash(row["online_over_offline"], ".2f"),
        "memory MB": str(row["memory_mb"]),
        "GFLOP": f"{row['gflops']:.0f}",
        "GEMM share": f"{row['gemm_share']:.2f}",
        "M parameters": f"{row['parameters_millions']:.1f}",
        "kB an image": or_dash(row["token_bytes_per_image"] / 1000, ".0f"),
        "ImageNet TB": or_dash(row["imagenet_tb"], ".2f"),
        "paper s": or_dash(row["paper_seconds"], ".2f"),
        "paper MB": or_dash(row["paper_memory_mb"], ".0f"),
    }
