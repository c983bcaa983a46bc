"""Whether training is right on this device: losses beside the CPU's, compiled, after a stop, in a group."""

import json
from concurrent.futures import Future
from pathlib import Path

from gpu_check.commands import Outcome
from gpu_check.report import Report, shown
from gpu_check.setting import Setting

FIRST = 5
"""Steps whose losses are compared. Later ones differ more and more, since training amplifies rounding."""
BOUNDS = {"fp32": 2e-4, "tf32": 1e-2, "bf16": 3e-2, "compiled, fp32": 2e-4, "micro-batches, fp32": 2e-4}
"""Largest relative difference to the CPU's losses in fp32. On an H200, fp32 gave 2e-7 and bf16 2e-5."""
RESUMED, NOISE_FACTOR = 1e-4, 10
"""Largest relative difference of a run that was stopped and continued to one that was not, over all losses: this, or so
many times the difference of two equal runs."""
GROUPED = 3e-2
"""The same for a group, in --precision auto."""
STOP_AFTER = 3
"""Steps that are logged by then."""
INTERRUPTED = 130
"""Exit code of a command that was stopped and has saved."""
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Without it, 32-true takes TF32 on a GPU."""

Running = dict[str, Future[Outcome]]


def correctness(setting: Setting, report: Report) -> None:
    """The first losses by device, precision and compilation; and a run that is stopped and continued."""
    first, whole = _start_first(setting), _start_whole(setting)
    reference = _losses(first.pop("cpu").result(), _folder(setting, "cpu"))
    report.check("the CPU's first losses", len(reference) == FIRST, f"{FIRST} losses", f"{len(reference)} losses")
    for name, future in first.items():
        _compare(setting, report, f"first losses, {name} and the CPU", reference, name, future, BOUNDS[name])
    _check_continued(setting, report, whole)


def groups(setting: Setting, report: Report) -> None:
    """DDP and FSDP2 in a group of one process, which is NCCL's on a GPU: the losses of a run without a group."""

    def start(name: str, *options: str, group: bool) -> Future[Outcome]:
        call = setting.pretrain(_folder(setting, name), *options, "--no-resume", steps=FIRST, precision="auto")
        return setting.commands.submit(call, group=group)

    alone = start("alone", group=False)
    grouped = {name: start(name, "--strategy", name, group=True) for name in ("ddp", "fsdp")}
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
    variants: dict[str, tuple[str, list[str], dict[str, str]]] = {
        "cpu": ("32-true", ["--device", "cpu"], {}),
        "fp32": ("32-true", [], EXACT),
        "tf32": ("32-true", [], {}),
        "bf16": ("bf16-mixed", [], {}),
        "micro-batches, fp32": ("32-true", ["--micro-batch", micro_batch], EXACT),
        "compiled, fp32": ("32-true", ["--compile"], EXACT),
    }
    return {
        name: setting.commands.submit(
            setting.pretrain(_folder(setting, name), *options, "--no-resume", steps=FIRST, precision=precision),
            environment,
        )
        for name, (precision, options, environment) in variants.items()
    }


def _start_whole(setting: Setting) -> Running:
    """Two equal runs that end, and one that is stopped."""

    def start(name: str) -> Future[Outcome]:
        metrics = _folder(setting, name) / "metrics.jsonl"

        def has_begun() -> bool:
            return metrics.exists() and len(metrics.read_bytes().splitlines()) >= STOP_AFTER

        stop_when = has_begun if name == "stopped" else None
        return setting.commands.submit([*setting.small_run(_folder(setting, name)), "--no-resume"], stop_when=stop_when)

    return {name: start(name) for name in ("whole", "again", "stopped")}


def _check_continued(setting: Setting, report: Report, running: Running) -> None:
    stopped = running["stopped"].result()
    report.check("a SIGTERM stops", stopped.code == INTERRUPTED, f"exit code {INTERRUPTED}", stopped.ending)
    continued = setting.commands.run(setting.small_run(_folder(setting, "stopped")))
    curve, again = (_losses(running[name].result(), _folder(setting, name)) for name in ("whole", "again"))
    noise = apart(curve, again)
    bound = max(RESUMED, NOISE_FACTOR * noise)
    report.figure("two equal runs differ by", noise)
    difference = apart(curve, _losses(continued, _folder(setting, "stopped")))
    expected = f"losses within {shown(bound)} of a run that was not stopped"
    report.check(
        "stopped and continued", difference <= bound, expected, _seen(difference, continued), continued.details
    )


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
