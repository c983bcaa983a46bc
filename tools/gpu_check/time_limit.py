"""Ends work that takes too long: a step or a loader that hangs would otherwise take the whole check with it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTimeError(Exception):
    """The time for a stage is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise an OutOfTimeError in the main thread if the context takes longer.

    Args:
        seconds: the limit.
    """

    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfTimeError(f"not done after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler)
