"""How fast students train here: around a fixed batch and with the real loader, eager and compiled."""

import time
from collections.abc import Sequence

import torch

from gpu_check.report import Goal, Report
from gpu_check.setting import Setting
from gpu_check.steps import Trial, steps_of

PAPER, BEST, MAE = "vit_base_60ep", "visible_base_60ep", "mae_300ep"
VIEWS_PER_SECOND, LOADER_SHARE, COMPILED, TIMES_MAE = Goal(10_000), Goal(0.9), Goal(1.3), Goal(1.9)
SECONDS = {False: 30.0, True: 80.0}
"""About how long a trial takes on a GPU, eager and compiled; once one was made, its time counts."""
TOY_SECONDS = 5.0

Rates = dict[Trial, float]
"""Views per second around a fixed batch."""


def speed(setting: Setting, report: Report) -> None:
    """The large batch: the paper's recipe, the best one, and MAE."""
    batch = setting.sizes.batches[1]
    paper, mae = Trial(PAPER, "pq38", batch), Trial(MAE, "pq38", batch)
    compiled, mae_compiled, best = (Trial(recipe, "pq38", batch, compile=True) for recipe in (PAPER, MAE, BEST))
    rates = _measure(setting, report, [paper, compiled, mae_compiled, best, mae], {compiled: VIEWS_PER_SECOND})
    _ratio(report, "compiled / eager", rates, compiled, paper, COMPILED)
    _ratio(report, "FastMAE / MAE, compiled alike", rates, compiled, mae_compiled, TIMES_MAE)
    _ratio(report, "FastMAE / MAE, both eager", rates, paper, mae)


def more_speed(setting: Setting, report: Report) -> None:
    """The small batch, and stores in fp16."""
    small, large = setting.sizes.batches
    eager = [Trial(PAPER, codec, batch) for codec, batch in (("fp16", large), ("pq38", small), ("fp16", small))]
    compiled = [Trial(PAPER, trial.codec, trial.batch, compile=True) for trial in eager]
    rates = _measure(setting, report, [*eager, *compiled], {})
    for before, after in zip(eager, compiled, strict=True):
        _ratio(report, f"compiled / eager, {before.codec}, batch {before.batch}", rates, after, before, COMPILED)


def _measure(setting: Setting, report: Report, trials: Sequence[Trial], goals: dict[Trial, Goal]) -> Rates:
    """Time the trials in their order, as far as the time lasts."""
    rates: Rates = {}
    expected = dict(SECONDS) if setting.on_gpu else dict.fromkeys(SECONDS, TOY_SECONDS)
    for trial in trials:
        if setting.left < expected[trial.compile]:
            report.leave_out(str(trial), f"{setting.left:.0f} s left, {expected[trial.compile]:.0f} s needed")
            continue
        start = time.monotonic()
        try:
            rates[trial] = _time(setting, report, trial, goals.get(trial))
        except torch.OutOfMemoryError:
            report.leave_out(str(trial), "needs more memory than the card has")
        expected[trial.compile] = time.monotonic() - start
    return rates


def _time(setting: Setting, report: Report, trial: Trial, goal: Goal | None) -> float:
    seconds = setting.sizes.timed_seconds
    with steps_of(setting, trial) as steps:
        fixed = steps.fixed_rate(seconds)
        report.figure(f"{trial}: a fixed batch", fixed, "views/s")
        if setting.on_gpu:
            report.figure(f"{trial}: memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
        if trial.recipe != MAE:
            loaded = steps.loaded_rate(seconds, fixed)
            report.figure(f"{trial}: with the loader", loaded, "views/s", goal)
            report.figure(f"{trial}: loader / fixed batch", loaded / fixed, "", LOADER_SHARE)
    return fixed


def _ratio(report: Report, name: str, rates: Rates, over: Trial, under: Trial, goal: Goal | None = None) -> None:
    if over in rates and under in rates:
        report.figure(name, rates[over] / rates[under], "", goal)
