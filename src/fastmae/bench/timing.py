"""Side-by-side timing: in each round every contender has a turn, so a slow spell of the machine hits them all alike."""

import contextlib
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastmae.runtime.device import synchronise
from fastmae.runtime.progress import Progress

Name = TypeVar("Name")
CPU = torch.device("cpu")

Turn = Callable[[int], float]
"""What a contender does in one round: takes the round's number, does its work and returns the seconds it took."""


@dataclass(frozen=True)
class Rate:
    """Units per second over the rounds of a benchmark.

    Attributes:
        median: rate of the median round.
        slowest: rate of the slowest round.
        fastest: rate of the fastest round.
    """

    median: float
    slowest: float
    fastest: float

    @classmethod
    def of(cls, units: int, seconds: Sequence[float]) -> "Rate":
        """The rate of doing `units` units in each round, given the seconds of each round."""
        return cls(units / statistics.median(seconds), units / max(seconds), units / min(seconds))

    def to_json(self, name: str) -> dict[str, float]:
        """The rate under the keys `name`, `name_min` and `name_max`."""
        return {
            name: round(self.median, 2),
            f"{name}_min": round(self.slowest, 2),
            f"{name}_max": round(self.fastest, 2),
        }


def format_rate(rate: float) -> str:
    """A rate for a table: one decimal below 100, none above."""
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def format_spread(row: Mapping[str, Any], name: str) -> str:
    """The slowest and the fastest round of a row that holds `Rate.to_json(name)`, for a table."""
    return f"{format_rate(row[f'{name}_min'])}-{format_rate(row[f'{name}_max'])}"


def seconds_of(
    work: Callable[[], object], device: torch.device = CPU, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The seconds that a piece of work takes, including what it queues on a GPU."""
    start = clock()
    work()
    synchronise(device)
    return clock() - start


def same_every_round(
    work: Callable[[], object], device: torch.device = CPU, clock: Callable[[], float] = time.perf_counter
) -> Turn:
    """A turn for `interleave` that does the same work in every round, timed by `seconds_of`."""
    return lambda _: seconds_of(work, device, clock)


def interleave(
    turns: Mapping[Name, Turn], rounds: int, label: str = "measure", expected: Mapping[Name, float] | None = None
) -> dict[Name, list[float]]:
    """Time the contenders in turn, round after round. Round 0 warms up and is not counted.

    Args:
        turns: each contender's turn, by its name.
        rounds: number of rounds that count.
        label: first word of the progress line.
        expected: seconds that the turns of some will take, for the time left in round 0.

    Returns:
        The seconds of each contender, one per round that counts.
    """
    names = list(turns)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    timetable = Timetable(dict.fromkeys(names, rounds + 1), expected)
    with Progress(label, "turns", timetable.turns) as progress:
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:  # another contender begins each round, so none is always first
                progress.expect(timetable.seconds_left())
                progress.now(f"{_shown(name)}, {f'round {number} of {rounds}' if number else 'warm-up'}")
                with timetable.turn(name):
                    seconds[name].append(turns[name](number))
                progress.advance(1)
    return {name: counted for name, (_, *counted) in seconds.items()}


class Timetable:
    """The turns that are to come, and how long they will take by the last turn of each contender.

    Args:
        turns: number of turns of each contender.
        expected: seconds of a turn, where that is known before the first one.
    """

    def __init__(self, turns: Mapping[Name, int], expected: Mapping[Name, float] | None = None):
        self.left: dict[Any, int] = dict(turns)
        self.seconds: dict[Any, float] = dict(expected or {})

    @property
    def turns(self) -> int:
        """Number of turns to come."""
        return sum(self.left.values())

    @contextlib.contextmanager
    def turn(self, name: Hashable) -> Iterator[None]:
        """Time a turn, by the clock on the wall."""
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.left[name] -= 1

    def seconds_left(self) -> float | None:
        """None until two contenders are known, or the only one. Others are taken for the mean of those that are."""
        if len(self.seconds) < min(2, len(self.left)):
            return None
        mean = statistics.fmean(self.seconds.values())
        return sum(count * self.seconds.get(name, mean) for name, count in self.left.items())


def _shown(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
