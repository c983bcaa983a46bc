"""How far a command is: a bar where the command line has a terminal, otherwise a line in the log every ten seconds.

Rate and time left come from the last minute of this call, never from what an earlier call had done. Work inside other
work (a run of a study, an evaluation during training) adds to the line of the outermost one, so there is one line.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from fastmae.runtime import console

log = logging.getLogger(__name__)  # `console.PROGRESS`, which goes to stderr

LOG_EVERY = 10.0
"""Seconds between two lines in the log."""
WINDOW = 60.0
"""Seconds over which the rate is measured."""
BAR_WIDTH = 20
"""Characters; what is done and how long it takes needs the rest of the line."""
SLOW = 0.5
"""Units per second below which a rate is given in time per unit."""

Item = TypeVar("Item")


class Rate:
    """Units per second over the last `WINDOW` seconds.

    The first units of a call also start its processes and warm up. They are left out as soon as those after them have
    taken as long, so that they don't decide the time left.

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
        if len(self.marks) > 2 and not done_at_start:
            first, done_at_first = self.marks[1]
            if end - first >= first - start:
                start, done_at_start = first, done_at_first
        return (done_at_end - done_at_start) / (end - start) if end > start else 0.0

    @property
    def since_last(self) -> float:
        """Seconds since units were counted."""
        return self.clock() - self.marks[-1][0]

    def seconds_for(self, units: float) -> float | None:
        """Time that this many units take at the current rate; None while no more than the first ones are known."""
        return units / self.per_second if len(self.marks) > 2 and self.per_second > 0 else None


class Progress:
    """Counts units of work up to a total, and shows the rate and the time left. Use it as a context manager.

    Args:
        label: first word of the line ('tokenize').
        unit: name of the units ('images').
        total: number of units, those of earlier calls included; None for work that can't be counted, or whose end is
            not known, of which the time so far is shown.
        done: number of units that earlier calls have done. If that is all of them, nothing is shown.
        quiet: show nothing, as in every process but the first.
        scale: number of rate units per unit ('images' per step, say).
        rate_unit: name of the rate's units. Default: `unit`.
        minor: a step beside the command's work: shown only while it lasts, and in a log only if that is long.
        style: what is shown on a terminal: a bar; lines, as in a log; or nothing, where another library draws a bar.
    """

    def __init__(
        self,
        label: str,
        unit: str = "",
        total: int | None = None,
        done: int = 0,
        quiet: bool = False,
        scale: int = 1,
        rate_unit: str = "",
        minor: bool = False,
        style: Literal["bar", "lines", "nothing"] = "bar",
    ):
        self.label, self.unit, self.total, self.done = label, unit, total, done
        self.quiet = quiet or (total is not None and done >= total)
        self.scale, self.rate_unit, self.minor, self.style = scale, rate_unit or unit, minor, style
        self.rate = Rate()
        self.fields = self.doing = ""
        self.expected: tuple[float, float] | None = None
        self.is_estimated = self.is_over = False
        self.started = self.last_logged = time.monotonic()
        self.bar: Bar | None = None
        self.ticker: _Ticker | None = None

    def __enter__(self) -> "Progress":
        self.started = self.last_logged = time.monotonic()
        if self.quiet:
            return self
        _entered.append(self)
        # From Python, nothing is drawn: the package only logs there.
        if _entered[0] is self and console.is_shown():
            if self.style == "bar" and sys.stderr.isatty():
                self.bar = _bar(self)
                self.bar.start()
            else:
                self.ticker = _Ticker(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        self.is_over, self.doing = True, ""
        is_outermost = _entered[0] is self
        _entered.remove(self)
        if self.bar is not None:
            self.bar.stop()
        if self.ticker is not None:
            self.ticker.end()
        is_long = time.monotonic() - self.started >= LOG_EVERY
        if is_outermost and self._is_logged and kind is None and (is_long or not self.minor):
            self._log()

    def advance(self, units: int, **fields: str) -> None:
        """Count units.

        Args:
            units: number of units done since the last call.
            fields: values shown after the rate, in this order (`loss="0.31"`); the last ones given stay.
        """
        self.done += units
        if units:
            self.rate.add(units)
        self.fields = "  ".join(f"{name} {value}" for name, value in fields.items()) or self.fields
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        self._shown()

    def now(self, doing: str) -> None:
        """Say what is being done, in a few words at the end of the line ('MAE, round 2 of 10')."""
        self.doing = doing
        self._shown()

    def expect(self, seconds: float | None) -> None:
        """Set the time left, counted down from here: for units that take unequal times. None: not known yet."""
        self.is_estimated, self.expected = True, None if seconds is None else (time.monotonic(), seconds)

    def seconds_left(self) -> float | None:
        """None while it is not known. Less than nothing, if what was expected is over."""
        if self.is_estimated:
            return None if self.expected is None else self.expected[1] - (time.monotonic() - self.expected[0])
        seconds = None if self.total is None else self.rate.seconds_for(self.total - self.done)
        return None if seconds is None else seconds - self.rate.since_last

    def rate_text(self) -> str:
        """Rate, time left and fields: `32.0 images/s  left 18 s  loss 0.31`."""
        return "  ".join(filter(None, [self._rate(), self._left(), self.fields, self.doing]))

    def line(self) -> str:
        """`tokenize  320/1000 images  32.0 images/s  left 18 s`."""
        return "  ".join(filter(None, [self.label, self.counts(), self.rate_text()]))

    def counts(self) -> str:
        """`320/1000 images`; or `320 images`, where the total is not known."""
        if self.total is None:
            return f"{self.done} {self.unit}" if self.unit else ""
        return f"{self.done}/{self.total} {self.unit}"

    def _rate(self) -> str:
        per_second = self.rate.per_second * self.scale
        if self.is_estimated or not self.unit or not per_second:
            return ""
        if per_second < SLOW:
            return f"{duration(1 / per_second)} per {_one_of(self.rate_unit)}"
        return f"{per_second:.1f} {self.rate_unit}/s"

    def _left(self) -> str:
        took = duration(time.monotonic() - self.started)
        so_far = f"{took} so far"
        if self.total is not None and self.done >= self.total:
            return f"took {took}" if self.is_over else so_far
        if self.total is None and self.expected is None:
            return so_far
        seconds = self.seconds_left()
        if seconds is not None and seconds <= -1:
            return f"{so_far}, {duration(-seconds)} more than expected"
        return f"left {duration(max(0.0, seconds))}" if seconds is not None else f"left ?, {so_far}"

    def _shown(self) -> None:
        """Log a line if it is time. A bar draws itself."""
        if not self.quiet and _entered:
            _entered[0].log_if_due()

    def log_if_due(self) -> None:
        """Log a line, if the last one was `LOG_EVERY` seconds ago."""
        with _logging:
            if self._is_logged and time.monotonic() - self.last_logged >= LOG_EVERY:
                self._log()

    @property
    def _is_logged(self) -> bool:
        return self.bar is None and not (self.style == "nothing" and sys.stderr.isatty())

    def _log(self) -> None:
        self.last_logged = time.monotonic()
        log.info("  ".join([self.line(), *self.inner()]))

    def inner(self) -> list[str]:
        """The lines of the work inside this one: `(knn  320/1000 images  32.0 images/s  left 18 s)`."""
        return [f"({work.line()})" for work in tuple(_entered) if work is not self and _entered[0] is self]


def _one_of(units: str) -> str:
    """`image` of `images`, `batch` of `batches`."""
    return units.removesuffix("es") if units.endswith("ches") else units.removesuffix("s")


_entered: list[Progress] = []
"""Those that are entered in this process, from the outermost to the innermost."""
_logging = threading.Lock()
"""Of two threads that would log a line at once, one does."""


def counted_through(
    items: Iterable[Item], label: str, unit: str, total: int, quiet: bool = False, minor: bool = True
) -> Iterator[Item]:
    """The items, counted as they are taken. Arguments as `Progress`'s."""
    with Progress(label, unit, total, quiet=quiet, minor=minor) as progress:
        for item in items:
            yield item
            progress.advance(1)


class _Ticker:
    """Logs a line where nothing is counted for a while: a unit may take minutes."""

    def __init__(self, progress: Progress):
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._tick, args=(progress,), daemon=True)
        self.thread.start()

    def _tick(self, progress: Progress) -> None:
        while not self.over.wait(max(LOG_EVERY / 4, 0.01)):
            progress.log_if_due()

    def end(self) -> None:
        """No line comes after this."""
        self.over.set()
        self.thread.join()


def _bar(progress: Progress) -> Bar:
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True))
    columns = (text, BarColumn(BAR_WIDTH), _StateColumn(progress, table_column=Column(no_wrap=True)))
    bar = Bar(
        *columns,
        console=Console(stderr=True),
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file must not be led to the terminal
        transient=progress.minor,
    )
    bar.add_task(progress.label, total=progress.total, completed=progress.done)
    return bar


class _StateColumn(ProgressColumn):
    """What follows the bar."""

    def __init__(self, progress: Progress, table_column: Column):
        super().__init__(table_column=table_column)
        self.progress = progress

    def render(self, task: Task) -> Text:
        parts = [self.progress.counts(), self.progress.rate_text(), *self.progress.inner()]
        return Text("  ".join(filter(None, parts)), overflow="ellipsis")


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
