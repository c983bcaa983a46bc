"""What the check found: a line for each finding as it goes, a Markdown table, and everything as JSON."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARKDOWN, JSON = "gpu_check.md", "gpu_check.json"


@dataclass(frozen=True)
class Goal:
    """What a figure should be on one H100.

    Attributes:
        value: the goal.
        at_most: whether less is better.
    """

    value: float
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {shown(self.value)}"

    def reached(self, value: float) -> bool:
        """Whether a figure is as good as the goal."""
        return value <= self.value if self.at_most else value >= self.value


@dataclass(frozen=True)
class Check:
    """Something that must be so on every machine.

    Attributes:
        stage: the stage that looked.
        name: what was looked at.
        passed: the outcome.
        expected: what should be seen.
        seen: what was seen.
        details: for a failure, what helps to understand it: a traceback, a command's last messages.
    """

    stage: str
    name: str
    passed: bool
    expected: str
    seen: str
    details: str = ""


@dataclass(frozen=True)
class Figure:
    """Something that was measured.

    Attributes:
        stage: the stage that measured.
        name: what was measured.
        value: the number.
        unit: its unit; '' for a ratio or a count.
        goal: what it should be on one H100; '' for none.
        reached: whether it is; None without a goal, or at toy size.
    """

    stage: str
    name: str
    value: float
    unit: str = ""
    goal: str = ""
    reached: bool | None = None


@dataclass(frozen=True)
class LeftOut:
    """Something that was not looked at.

    Attributes:
        name: a stage, or a part of one.
        why: the reason.
    """

    name: str
    why: str


class Report:
    """Collects findings, prints them, and keeps both files up to date, so that a crash loses nothing.

    Args:
        folder: for the two files; made if it does not exist.
        judges: whether figures are compared with their goals; at toy size they mean nothing.
    """

    def __init__(self, folder: Path, judges: bool = True):
        self.folder, self.judges = folder, judges
        self.start = time.monotonic()
        self.stage, self.stage_start = "", 0.0
        self.machine: dict[str, str] = {}
        self.checks: list[Check] = []
        self.figures: list[Figure] = []
        self.left_out: list[LeftOut] = []
        self.stage_seconds: dict[str, float] = {}
        self.extra: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self.start

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    def begin(self, stage: str) -> None:
        """The findings that follow belong to this stage."""
        self.end()
        self.stage, self.stage_start = stage, self.seconds
        self._say(f"---- {stage}")

    def end(self) -> None:
        """The stage that was begun last has ended."""
        if self.stage:
            self.stage_seconds[self.stage] = round(self.seconds - self.stage_start, 1)
        self.stage = ""

    def check(self, name: str, passed: bool, expected: str, seen: str, details: str = "") -> None:
        """Add a check; its arguments are those of `Check`."""
        self.checks.append(Check(self.stage, name, bool(passed), expected, seen, "" if passed else details))
        self._say(f"PASS {name}: {seen}" if passed else f"FAIL {name}: expected {expected}; seen: {seen}")
        self.write()

    def figure(self, name: str, value: float, unit: str = "", goal: Goal | None = None) -> None:
        """Add a figure; its arguments are those of `Figure`."""
        reached = goal.reached(value) if goal and self.judges else None
        self.figures.append(Figure(self.stage, name, value, unit, str(goal or ""), reached))
        judged = f" (goal {goal}{_judged(reached, ': ')})" if goal else ""
        self._say(f"     {name}: {shown(value)} {unit}".rstrip() + judged)
        self.write()

    def leave_out(self, name: str, why: str) -> None:
        """Say that something is not looked at."""
        self.left_out.append(LeftOut(name, why))
        self._say(f"LEFT OUT {name}: {why}")
        self.write()

    def write(self) -> None:
        """Write both files."""
        content = {
            "machine": self.machine,
            "seconds": round(self.seconds, 1),
            "stage_seconds": self.stage_seconds,
            "checks": [asdict(check) for check in self.checks],
            "figures": [asdict(figure) for figure in self.figures],
            "left_out": [asdict(part) for part in self.left_out],
            **self.extra,
        }
        (self.folder / JSON).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.folder / MARKDOWN).write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The tables, with the machine above them."""
        parts = [
            "# GPU check",
            "\n".join(f"- {name}: {value}" for name, value in self.machine.items()),
            self.verdict(),
        ]
        if self.checks:
            rows = [[c.stage, c.name, "PASS" if c.passed else "**FAIL**", c.expected, c.seen] for c in self.checks]
            parts += [_table(["stage", "check", "outcome", "expected", "seen"], rows)]
        if self.figures:
            rows = [
                [f.stage, f.name, f"{shown(f.value)} {f.unit}".strip(), f.goal, _judged(f.reached)]
                for f in self.figures
            ]
            parts += [_table(["stage", "figure", "value", "goal on one H100", "outcome"], rows)]
        if self.stage_seconds:
            times = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.stage_seconds.items())
            parts += [f"Seconds by stage: {times}."]
        if self.left_out:
            parts += [_table(["left out", "why"], [[part.name, part.why] for part in self.left_out])]
        return "\n\n".join(parts) + "\n"

    def verdict(self) -> str:
        """How many checks passed and, if not all did, what to send us."""
        failed, judged = self.failed, [figure.reached for figure in self.figures if figure.reached is not None]
        said = f"{len(self.checks) - len(failed)} of {len(self.checks)} checks passed in {self.seconds:.0f} s."
        if judged:
            said += f" {sum(judged)} of {len(judged)} goals reached; a goal that is missed is not a fault."
        if self.left_out:
            said += f" Left out: {'; '.join(part.name for part in self.left_out)}."
        if failed:
            names = "; ".join(check.name for check in failed)
            files = f"{self.folder / MARKDOWN} and {self.folder / JSON}"
            said += f"\n\nFAIL: {names}. Please open an issue (bug report) and attach {files}."
        return said

    def _say(self, line: str) -> None:
        print(f"[{self.seconds:6.1f}] {line}", flush=True)


def shown(value: float) -> str:
    """A number for people: 4,836; 93.2; 1.92; 2.1e-07."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0.999 <= value < 1:  # a cosine
        return f"{value:.5f}"
    return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _judged(reached: bool | None, before: str = "") -> str:
    return "" if reached is None else before + ("reached" if reached else "short")


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(names), ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in cells) + " |" for cells in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def numbers_of(outcome: Mapping[str, Any]) -> str:
    """The first numbers in a command's JSON, to be shown beside its check."""
    numbers = {
        name: value for name, value in outcome.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return ", ".join(f"{name} {shown(float(value))}" for name, value in list(numbers.items())[:4])
