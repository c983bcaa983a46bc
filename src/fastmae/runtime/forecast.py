"""How long several jobs of unequal length will take: predictions, corrected by how well earlier ones were met."""

import time
from collections.abc import Hashable


class Forecast:
    """The time left of jobs.

    Args:
        seconds: predicted for all that are to be done, one after the other.
        at_once: number of jobs that run at once.
    """

    def __init__(self, seconds: float, at_once: int = 1):
        self.seconds, self.at_once = seconds, at_once
        self.predicted = self.actual = 0.0
        self.started: dict[Hashable, float] = {}

    def begin(self, job: Hashable) -> None:
        """A job has started."""
        self.started[job] = time.monotonic()

    def end(self, job: Hashable, predicted: float) -> None:
        """A job has ended, for which so many seconds were predicted."""
        self.actual += time.monotonic() - self.started.pop(job)
        self.predicted += predicted

    def seconds_left(self) -> float:
        """Of all jobs together."""
        factor = self.actual / self.predicted if self.predicted else 1.0
        running = sum(time.monotonic() - start for start in self.started.values())
        return max(0.0, (self.seconds - self.predicted) * factor - running) / self.at_once
