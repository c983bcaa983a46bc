"""Whether training is right on this device: losses beside the CPU's, compiled, after a stop, in a group."""

import json
from concurrent.futures import Future
from pathlib import Path

from gpu_check.commands import Outcome
from gpu_check.report import Report, shown
from gpu_check.setting import Setting

FIRST = 5
"""Steps whose losses are compared. Later ones differ more and more, since training amplifies rounding."""
BOUNDS = {"32-true": 2e-4, "tf32": 1e-2, "bf16-mixed": 3e-2, "micro-batches": 2e-4, "compiled": 2e-4}
"""Largest relative difference to the CPU's losses in fp32. On an H200, fp32 gave 2e-7 and bf16 2e-5."""
RESUMED, NOISE_FACTOR = 1e-4, 10
"""Largest relative difference of a run that was stopped and continued to one that was not, over all losses: this, or so
many times the difference of two equal runs. With --deterministic there must be none."""
GROUPED = 3e-2
"""The same for a group, in --precision auto."""
STOP_AFTER = 3
"""Steps that are logged when a run is stopped."""
INTERRUPTED = 130
"""Exit code of a command that was stopped and has saved."""
DETERMINISTIC = "--deterministic"

Running = dict[str, Future[Outcome]]


def correctness(setting: Setting, report: Report) -> None:
    """The first losses by precision, in parts and compiled; and runs that are stopped and continued."""
    first, runs = _start_first(setting), _start_runs(setting)
    reference = _losses(first.pop("cpu").result(), _folder(setting, "cpu"))
    report.check("the CPU's first losses", len(reference) == FIRST, f"{FIRST} losses", f"{len(reference)} losses")
    for name, future in first.items():
        _compare(setting, report, f"first losses, {name} and the CPU", reference, name, future, BOUNDS[name])
    whole, again = (_losses(runs[name].result(), _folder(setting, name)) for name in ("whole", "again"))
    noise = apart(whole, again)
    report.figure("two equal runs differ by", noise)
    _check_continued(setting, report, whole, "stopped", runs["stopped"], max(RESUMED, NOISE_FACTOR * noise))
    exact = _losses(runs["deterministic"].result(), _folder(setting, "deterministic"))
    _check_continued(setting, report, exact, "deterministic, stopped", runs["deterministic, stopped"], 0.0)


def groups(setting: Setting, report: Report) -> None:
    """DDP and FSDP2 in a group of one process, which is NCCL's on a GPU: the losses of a run without a group."""

    def start(name: str, *options: str, group: str = "") -> Future[Outcome]:
        call = setting.pretrain(_folder(setting, name), *options, "--no-resume", steps=FIRST, precision="auto")
        return setting.commands.submit(call, group=group)

    alone = start("alone")
    grouped = {name: start(name, "--strategy", name, group=name) for name in ("ddp", "fsdp")}
    reference = _losses(alone.result(), _folder(setting, "alone"))
    for name, future in grouped.items():
        _compare(setting, report, f"{name} in a group of one", reference, name, future, GROUPED)


def apart(curve: list[float], other: list[float]) -> float:
    """Largest relative difference of two curves of losses; infinite if they differ in length or are empty."""
    if len(curve) != len(other) or not curve:
        return float("inf")
    return max(abs(a - b) / abs(a) for a, b in zip(curve, other, strict=True))


def _start_first(setting: Setting) -> Running:
    """Runs of a few steps."""
    micro_batch = str(setting.sizes.small_batch // 4)
    variants = {
        "cpu": ("32-true", ["--device", "cpu"]),
        "32-true": ("32-true", []),
        "tf32": ("tf32", []),
        "bf16-mixed": ("bf16-mixed", []),
        "micro-batches": ("32-true", ["--micro-batch", micro_batch]),
        "compiled": ("32-true", ["--compile"]),
    }
    calls = {
        name: setting.pretrain(_folder(setting, name), *options, "--no-resume", steps=FIRST, precision=precision)
        for name, (precision, options) in variants.items()
    }
    return {name: setting.commands.submit(call) for name, call in calls.items()}


def _start_runs(setting: Setting) -> Running:
    """Two equal runs that end, and one that is stopped; the same with deterministic kernels."""

    def start(name: str) -> Future[Outcome]:
        metrics = _folder(setting, name) / "metrics.jsonl"

        def has_begun() -> bool:
            return metrics.exists() and len(metrics.read_bytes().splitlines()) >= STOP_AFTER

        stop_when = has_begun if "stopped" in name else None
        return setting.commands.submit([*_call(setting, name), "--no-resume"], stop_when=stop_when)

    return {name: start(name) for name in ("whole", "again", "stopped", "deterministic", "deterministic, stopped")}


def _call(setting: Setting, name: str) -> list[str]:
    call = setting.small_run(_folder(setting, name))
    return [*call, DETERMINISTIC] if name.startswith("deterministic") else call


def _check_continued(
    setting: Setting, report: Report, whole: list[float], name: str, future: Future[Outcome], bound: float
) -> None:
    """A run that is stopped saves itself, and the same call then reaches the losses of one that was not."""
    stopped = future.result()
    code = f"exit code {INTERRUPTED}"
    report.check(f"{name} by SIGTERM", stopped.code == INTERRUPTED, code, stopped.ending, stopped.details)
    continued = setting.commands.run(_call(setting, name))
    difference = apart(whole, _losses(continued, _folder(setting, name)))
    expected = f"losses within {shown(bound)} of a run that was not stopped"
    seen = _seen(difference, continued)
    report.check(f"{name} and continued", difference <= bound, expected, seen, continued.details)


def _compare(
    setting: Setting,
    report: Report,
    check: str,
    reference: list[float],
    name: str,
    future: Future[Outcome],
    bound: float,
) -> None:
    outcome = future.result()
    difference = apart(reference, _losses(outcome, _folder(setting, name)))
    seen = _seen(difference, outcome)
    report.check(check, difference <= bound, f"losses within {shown(bound)}", seen, outcome.details)


def _seen(difference: float, outcome: Outcome) -> str:
    return f"{shown(difference)} apart" if outcome.code == 0 else outcome.ending


def _folder(setting: Setting, name: str) -> Path:
    return setting.run if name == "whole" else setting.work / "runs" / name.replace(", ", "-")


def _losses(outcome: Outcome, run: Path) -> list[float]:
    """The losses that a run logged; [] if its command failed."""
    if outcome.code != 0:
        return []
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]
