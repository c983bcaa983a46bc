"""The check's arguments, and the order of its stages.

The stages run in the order of their importance. One that would go over the budget is left out, and said so.
"""

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmae.runtime.device import cores
from gpu_check.benches import bench_count, bench_loader, bench_step, bench_store
from gpu_check.commands import Commands
from gpu_check.correctness import correctness, groups
from gpu_check.detection import detection
from gpu_check.every_command import every_command, studies
from gpu_check.inputs import inputs
from gpu_check.inside import inside
from gpu_check.machine import describe, imports
from gpu_check.report import Report
from gpu_check.setting import FULL, TOY, Setting
from gpu_check.speed import more_speed, speed
from gpu_check.time_limit import OutOfTimeError, time_limit
from gpu_check.tokenising import tokenising

MOST_AT_ONCE = 8
"""Most commands at the same time on a GPU."""
COMMAND_GIB = 3
"""Memory that a small student's command may take on the GPU."""
GRACE = 60.0
"""A stage that has begun may take this much longer than the budget."""
TOY_FACTOR = 10.0
"""How much sooner a stage is done at toy size."""


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        run: does it.
        seconds: about how long it takes on one GPU; it is not begun with less left.
        needs: stages that must have run before.
        lacks: what the call did not give; empty if the stage can run.
    """

    run: Callable[[Setting, Report], None]
    seconds: float
    needs: tuple[str, ...] = ()
    lacks: Callable[[Setting], str] = lambda setting: ""


STAGES = {
    "imports": Stage(imports, 10),
    "inputs": Stage(inputs, 30),
    "correctness": Stage(correctness, 50, ("inputs",)),
    "tokenising": Stage(tokenising, 35, ("inputs",)),
    "inside": Stage(inside, 20, ("inputs",)),
    "groups": Stage(groups, 25, ("inputs",)),
    "commands": Stage(every_command, 50, ("inputs",)),
    "speed": Stage(speed, 30, ("inputs",)),
    "count": Stage(bench_count, 20),
    "bench": Stage(bench_step, 80),
    "store": Stage(bench_store, 40, ("inputs",)),
    "more-speed": Stage(more_speed, 30, ("inputs",)),
    "loader": Stage(bench_loader, 60, ("inputs",)),
    "studies": Stage(studies, 60, ("inputs",)),
    "detection": Stage(detection, 150, lacks=lambda setting: "" if setting.detect else "give --detect RUN DATA"),
}
"""Name -> stage, the most important first."""


def main(arguments: Sequence[str]) -> int:
    """Run the check.

    Args:
        arguments: those of the command line.

    Returns:
        0 if all checks pass, 1 if one fails, 2 if there is no GPU or an argument is wrong.
    """
    options = _parser().parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU; give --cpu to try the check itself at toy size")
        return 2
    report = Report(options.out, judges=not options.cpu)
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True))
        report.machine = describe("cpu" if options.cpu else "cuda")
        setting = _setting(options, options.work or Path(temporary))
        stack.callback(setting.commands.close)
        run_stages(_chosen(options.stages), setting, report)
    report.write()
    print(f"\n{report.markdown()}", flush=True)
    print(f"Written: {options.out / 'gpu_check.md'}, {options.out / 'gpu_check.json'}", flush=True)
    return 1 if report.failed else 0


def run_stages(stages: dict[str, Stage], setting: Setting, report: Report) -> None:
    """Run stages in their order, as far as the budget lasts.

    A stage that raises is a check that fails. The others go on, but for those that need it.
    """
    not_run: set[str] = set()
    for name, stage in stages.items():
        needed = stage.seconds if setting.on_gpu else stage.seconds / TOY_FACTOR
        missing = not_run & {*stage.needs}
        why = ""
        if missing:
            why = f"needs {', '.join(missing)}"
        elif stage.lacks(setting):
            why = stage.lacks(setting)
        elif setting.left < needed:
            why = f"{max(0, setting.left):.0f} s left, {needed:.0f} s needed"
        if why:
            not_run.add(name)
            report.leave_out(name, why)
            continue
        report.begin(name)
        try:
            with time_limit(max(setting.left, 0) + GRACE):
                stage.run(setting, report)
        except OutOfTimeError as error:
            report.check(f"{name} ends", False, "its end within the budget", str(error), traceback.format_exc())
        except Exception as error:  # any: the other stages still tell something
            report.check(f"{name} ends", False, "no error", repr(error)[:300], traceback.format_exc())
        report.end()
        if any(check.stage == name for check in report.failed):
            not_run.add(name)


def _chosen(names: str) -> dict[str, Stage]:
    """The stages that are asked for, and those that they need."""
    asked = set(filter(None, names.split(","))) or {*STAGES}
    needed = {need for name in asked for need in STAGES[name].needs}
    return {name: stage for name, stage in STAGES.items() if name in asked | needed}


def _setting(options: argparse.Namespace, work: Path) -> Setting:
    work = work.resolve()
    commands = Commands(work / "commands", _at_once(options.cpu), threads=1 if options.cpu else 0)
    return Setting(
        device="cpu" if options.cpu else "cuda",
        sizes=TOY if options.cpu else FULL,
        work=work,
        ends=time.monotonic() + options.budget,
        commands=commands,
        detect=tuple(options.detect) if options.detect else None,
    )


def _at_once(cpu: bool) -> int:
    """Commands that this machine can run at the same time."""
    if cpu:
        return cores()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(MOST_AT_ONCE, cores() // 2, int(memory // COMMAND_GIB)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Check fastmae on one GPU: what is right, and how fast it is."
    )
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU, to try the check itself")
    parser.add_argument(
        "--budget", type=float, default=420, help="seconds; what would go over is left out (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for the results (%(default)s)")
    parser.add_argument("--stages", type=_stage_names, default="", help=f"some of {','.join(STAGES)} (all)")
    parser.add_argument("--work", type=Path, help="folder for data, kept for the next call (a temporary one)")
    parser.add_argument(
        "--detect", nargs=2, type=Path, metavar=("RUN", "DATA"), help="also train `detect` on a run and real boxes"
    )
    return parser


def _stage_names(text: str) -> str:
    for name in filter(None, text.split(",")):
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"no stage {name!r}; give some of {','.join(STAGES)}")
    return text
