"""What happens within a step on a GPU: what makes the host wait, and which kernels run."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from gpu_check.report import Report
from gpu_check.setting import Setting
from gpu_check.speed import PAPER
from gpu_check.steps import WARMUP, Steps, Trial, steps_of

ROUNDS, SHOWN_KERNELS = 5, 25


def inside(setting: Setting, report: Report) -> None:
    """A step waits for nothing; its kernels, their time, and the host's."""
    if not setting.on_gpu:
        report.leave_out("host syncs, kernels", "there is no GPU")
        return
    for batch in setting.sizes.batches:
        with steps_of(setting, Trial(PAPER, "pq38", batch)) as steps:
            for _ in range(WARMUP):
                steps.take(steps.fixed)
            waits = _host_syncs(steps)
            seen = ", ".join(waits) or "none"
            report.check(f"host syncs in a step, batch {batch}", not waits, "none between two log entries", seen)
            _times(report, steps, batch)


def _host_syncs(steps: Steps) -> list[str]:
    """Where the host waits for the GPU during a step: file and line."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.take(next(steps.batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})


def _times(report: Report, steps: Steps, batch: int) -> None:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        steps.take(steps.fixed)
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            steps.take(steps.fixed)
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e3
    for name, value, unit in (
        ("a step", 1e3 * whole / ROUNDS, "ms"),
        ("the host's part of a step", 1e3 * launched / ROUNDS, "ms"),
        ("kernels of a step", busy / ROUNDS, "ms"),
        ("kernels of a step", sum(kernel.count for kernel in kernels) / ROUNDS, "launched"),
    ):
        report.figure(f"{name}, batch {batch}", value, unit)
    report.extra[f"kernels, batch {batch}"] = _longest(kernels)


def _longest(kernels: list[Any]) -> list[dict[str, Any]]:
    """The kernels that take most of a step, with calls and milliseconds a step."""
    longest = sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:SHOWN_KERNELS]
    return [
        {"kernel": k.key[:120], "calls": k.count / ROUNDS, "ms": round(k.self_device_time_total / 1e3 / ROUNDS, 3)}
        for k in longest
    ]
