"""Ranges of numeric options. A range stands in a field's annotation: `epochs: Annotated[int, AT_LEAST_1] = 60`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The values that a number may take; every limit is optional. NaN and infinity are never allowed.

    Attributes:
        ge: the smallest value allowed.
        gt: a lower limit that itself is not allowed.
        le: the largest value allowed.
        lt: an upper limit that itself is not allowed.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value lies in the range."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """`1 or more`, `more than 0`, `0 to 1`, `0 to less than 1`."""
        if self.le is None and self.lt is None:
            return f"{self.ge} or more" if self.ge is not None else f"more than {self.gt}"
        start = f"{self.ge}" if self.ge is not None else f"more than {self.gt}"
        return f"{start} to {self.le}" if self.le is not None else f"{start} to less than {self.lt}"


AT_LEAST_0 = Range(ge=0)
AT_LEAST_1 = Range(ge=1)
POSITIVE = Range(gt=0)
FRACTION = Range(ge=0, lt=1)
"""From 0 to less than 1: a rate of dropping or smoothing, a decay, a momentum."""
WORKERS = Range(ge=-1, le=1024)
VALUES = Range(ge=-(10**12), le=10**12)
"""Of pixels, of any type."""
SEED = Range(ge=0, lt=2**31)
