"""Measuring side by side: every work in turn, round after round, so that a slow spell of the machine falls on all of them."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastmae.errors import InputError

Name = TypeVar("Name")


@dataclass(frozen=True)
class Rate:
    """Units a second: the median over the rounds, and the slowest and the fastest of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, units: int, seconds: Sequence[float]) -> "Rate":
        """Of the seconds that so many units took in each round."""
        return cls(units / statistics.median(seconds), units / max(seconds), units / min(seconds))

    @property
    def shown(self) -> str:
        """Slowest to fastest."""
        return f"{figure(self.least)}-{figure(self.most)}"

    def to_json(self, name: str) -> dict[str, float]:
        """As `name`, `name_min` and `name_max`."""
        return {name: round(self.median, 2), f"{name}_min": round(self.least, 2), f"{name}_max": round(self.most, 2)}


def figure(value: float) -> str:
    """A rate, short enough for a table: one decimal below 100."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def seconds_of(work: Callable[[], object]) -> float:
    """How long a work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def interleave(works: Mapping[Name, Callable[[int], float]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of each work in each round; a first round, number 0, warms up and does not count.

    Args:
        works: name -> what does the work of a round, given its number, and returns its seconds.
        rounds: that count.
    """
    names = list(works)
    found: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:  # each round begins with another one
            found[name].append(works[name](number))
    return {name: seconds[1:] for name, seconds in found.items()}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Let torch compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_positive(**options: int) -> None:
    """Counts that must be there.

    Raises:
        InputError: one that is less than 1.
    """
    for name, value in options.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: give 1 or more")
