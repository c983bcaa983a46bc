"""How far a command is: a bar where the command line has a terminal, otherwise a line in the log every ten seconds.

Rate and time left come from the last minute of this call, never from what an earlier call had done.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fastmae.runtime import console

log = logging.getLogger(__name__)  # `console.PROGRESS`, which goes to stderr

LOG_EVERY = 10.0
"""Seconds between two lines in the log."""
WINDOW = 60.0
"""Seconds over which the rate is measured."""


class Rate:
    """Units per second over the last `WINDOW` seconds.

    Args:
        clock: gives the time in seconds; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.marks: deque[tuple[float, float]] = deque([(clock(), 0.0)])
        self.done = 0.0

    def add(self, units: float) -> None:
        """Count units that were done since the last call."""
        self.done += units
        now = self.clock()
        self.marks.append((now, self.done))
        while len(self.marks) > 2 and now - self.marks[1][0] > WINDOW:
            self.marks.popleft()

    @property
    def per_second(self) -> float:
        """0 until units were counted."""
        (start, done_at_start), (end, done_at_end) = self.marks[0], self.marks[-1]
        return (done_at_end - done_at_start) / (end - start) if end > start else 0.0

    def seconds_for(self, units: float) -> float | None:
        """Time that this many units take at the current rate; None while the rate is unknown."""
        return units / self.per_second if self.per_second > 0 else None


class Progress:
    """Counts units of work up to a total, and shows the rate and the time left. Use it as a context manager.

    Args:
        label: first word of the line ('tokenize').
        unit: name of the units ('images').
        total: number of units, those of earlier calls included.
        done: number of units that earlier calls have done. If that is all of them, nothing is shown.
        quiet: show nothing, as in every process but the first.
        scale: number of rate units per unit ('images' per step, say).
        rate_unit: name of the rate's units. Default: `unit`.
    """

    def __init__(
        self, label: str, unit: str, total: int, done: int = 0, quiet: bool = False, scale: int = 1, rate_unit: str = ""
    ):
        self.label, self.unit, self.total, self.done = label, unit, total, done
        self.quiet = quiet or done >= total > 0
        self.scale, self.rate_unit = scale, rate_unit or unit
        self.rate = Rate()
        self.fields = ""
        self.last_logged = time.monotonic()
        self.bar: Bar | None = None

    def __enter__(self) -> "Progress":
        # From Python, nothing is drawn: the package only logs there.
        if not self.quiet and console.is_shown() and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(self))
            self.bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self.bar.start()
            self.bar.add_task(self.label, total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif not self.quiet and kind is None:
            self._log()

    def advance(self, units: int, **fields: str) -> None:
        """Count units.

        Args:
            units: number of units done since the last call.
            fields: values shown after the rate, in this order (`loss="0.31"`); the last ones given stay.
        """
        self.done += units
        self.rate.add(units)
        self.fields = "  ".join(f"{name} {value}" for name, value in fields.items()) or self.fields
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif not self.quiet and time.monotonic() - self.last_logged >= LOG_EVERY:
            self._log()

    def rate_text(self) -> str:
        """Rate, time left and fields: `32.0 images/s  left 18 s  loss 0.31`."""
        rate = f"{self.rate.per_second * self.scale:.1f} {self.rate_unit}/s"
        left = f"left {duration(self.rate.seconds_for(self.total - self.done))}"
        return "  ".join(filter(None, [rate, left, self.fields]))

    def _log(self) -> None:
        self.last_logged = time.monotonic()
        log.info(f"{self.label}  {self.done}/{self.total} {self.unit}  {self.rate_text()}")


class _RateColumn(ProgressColumn):
    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:
        return Text(self.progress.rate_text())


def duration(seconds: float | None) -> str:
    """`12 s`, `3:04 min` or `1:02:03 h`; `?` if unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
