"""How far a command is, on standard error: a bar on a terminal, a line now and then in a log file.

The rate and the time left come from the last part of this call alone, not from what an earlier call had done.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

LOG_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
WINDOW = 60.0
"""Seconds over which the rate is taken."""


class Rate:
    """Units a second over the last `WINDOW` seconds.

    Args:
        clock: gives seconds; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.marks: deque[tuple[float, float]] = deque([(clock(), 0.0)])
        self.done = 0.0

    def add(self, units: float) -> None:
        """Count units that are done now."""
        self.done += units
        now = self.clock()
        self.marks.append((now, self.done))
        while len(self.marks) > 2 and now - self.marks[1][0] > WINDOW:
            self.marks.popleft()

    @property
    def per_second(self) -> float:
        """0 until something was counted."""
        (start, before), (end, after) = self.marks[0], self.marks[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def seconds_for(self, units: float) -> float | None:
        """Time for so many more units, or None when no rate is known yet."""
        return units / self.per_second if self.per_second > 0 else None


class Progress:
    """Counts units of work towards a total and shows rate and time left. Use as a context manager.

    Args:
        what: the line's first word ('tokenize').
        unit: what is counted ('images').
        total: units in all, those of earlier calls included.
        done: units of earlier calls.
        quiet: show nothing (other processes than the first); nor is anything shown where all was done before.
        scale: shown units a counted unit, for the rate (views a step, say).
        rate_unit: the unit of the shown rate.
    """

    def __init__(
        self, what: str, unit: str, total: int, done: int = 0, quiet: bool = False, scale: int = 1, rate_unit: str = ""
    ):
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.quiet = quiet or done >= total > 0
        self.scale, self.rate_unit = scale, rate_unit or unit
        self.rate = Rate()
        self.fields = ""
        self.last_line = time.monotonic()
        self.bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty():
            columns: tuple[ProgressColumn, ...] = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Tail(self),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self.bar.start()
            self.bar.add_task(self.what, total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif not self.quiet and kind is None:
            self._line()

    def advance(self, units: int, **fields: str) -> None:
        """Count units; `fields` are shown behind the rate, in their order ('loss' = '0.31')."""
        self.done += units
        self.rate.add(units)
        self.fields = "  ".join(f"{name} {value}" for name, value in fields.items()) or self.fields
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif not self.quiet and time.monotonic() - self.last_line >= LOG_EVERY:
            self._line()

    def tail(self) -> str:
        """Rate, time left and fields, as shown."""
        left = self.rate.seconds_for(self.total - self.done)
        parts = [f"{self.rate.per_second * self.scale:.1f} {self.rate_unit}/s", f"left {duration(left)}", self.fields]
        return "  ".join(part for part in parts if part)

    def _line(self) -> None:
        self.last_line = time.monotonic()
        print(f"{self.what}  {self.done}/{self.total} {self.unit}  {self.tail()}", file=sys.stderr, flush=True)


class _Tail(ProgressColumn):
    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:
        return Text(self.progress.tail())


def duration(seconds: float | None) -> str:
    """12 s, 3:04 min or 1:02:03 h; ? when unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
