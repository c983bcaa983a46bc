"""Ranges of numeric options. A range stands in a field's annotation: `epochs: Annotated[int, AT_LEAST_1] = 60`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The values that a number may take; every limit is optional. NaN and infinity are never allowed.

    Attributes:
        least: the smallest value allowed.
        above: a limit that itself is not allowed.
        most: the largest value allowed.
        below: a limit that itself is not allowed.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value lies in the range."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`1 or more`, `more than 0`, `0 to 1`, `0 to less than 1`."""
        if self.most is None and self.below is None:
            return f"{self.least} or more" if self.least is not None else f"more than {self.above}"
        start = f"{self.least}" if self.least is not None else f"more than {self.above}"
        return f"{start} to {self.most}" if self.most is not None else f"{start} to less than {self.below}"


AT_LEAST_0 = Range(least=0)
AT_LEAST_1 = Range(least=1)
POSITIVE = Range(above=0)
FRACTION = Range(least=0, below=1)
"""From 0 to less than 1: a rate of dropping or smoothing, a decay, a momentum."""
WORKERS = Range(least=-1, most=1024)
SEED = Range(least=0, below=2**31)
