"""Ranges of numeric options. A range stands in a field's annotation: `epochs: Annotated[int, AT_LEAST_1] = 60`."""

import math
from dataclasses import dataclass

COMMAS = "values with commas between them"
"""In the annotation of a text option that holds several values: on the command line, it may be given several times."""


@dataclass(frozen=True)
class Range:
    """The values that a number may take, from a lower limit to an upper one. NaN and infinity are never allowed.

    The upper limit is what no one can mean: a size beyond any memory, a rate beyond float32, a loop without an end.

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

    def __post_init__(self) -> None:
        assert (self.ge is None) != (self.gt is None), "one lower limit"
        assert (self.le is None) != (self.lt is None), "one upper limit"

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
        """`1 to 1000`, `more than 0 to 1`, `0 to less than 1`."""
        start = f"{self.ge}" if self.ge is not None else f"more than {self.gt}"
        return f"{start} to {self.le}" if self.le is not None else f"{start} to less than {self.lt}"


COUNT = Range(ge=1, le=1_000_000_000)
"""Of images, or of steps."""
COUNT_OR_0 = Range(ge=0, le=1_000_000_000)
BATCH = Range(ge=1, le=1 << 24)
BATCH_OR_0 = Range(ge=0, le=1 << 24)
ROUNDS = Range(ge=1, le=10_000)
SEEDS = Range(ge=1, le=1000)
PICTURES = Range(ge=0, le=100)
EPOCHS = Range(gt=0, le=1_000_000)
EPOCHS_OR_0 = Range(ge=0, le=1_000_000)
MINUTES = Range(gt=0, le=1_000_000)
"""Two years."""
MINUTES_OR_0 = Range(ge=0, le=1_000_000)
SECONDS = Range(gt=0, le=60_000_000)
LEARNING_RATE = Range(gt=0, le=10_000)
LEARNING_RATE_OR_0 = Range(ge=0, le=10_000)
WEIGHT_OR_0 = Range(ge=0, le=1_000_000)
"""Of a loss; of a decay; a norm."""
GIGABYTES = Range(gt=0, le=1_000_000_000)
PROCESSES = Range(ge=1, le=1 << 20)
WIDTH = Range(ge=1, le=65536)
HEAD_WIDTH = Range(ge=1, le=4096)
DEPTH = Range(ge=1, le=256)
HEADS = Range(ge=1, le=1024)
JPEG_QUALITY = Range(ge=1, le=100)
PATCH = Range(ge=1, le=1024)
THREADS = Range(ge=0, le=1024)
NEIGHBOURS = Range(ge=1, le=10_000)
TEMPERATURE = Range(ge=1e-6, le=1e6)
MIXING = Range(ge=0, le=1000)
"""Alpha of a beta distribution."""
FRACTION = Range(ge=0, lt=1)
"""From 0 to less than 1: a rate of dropping or smoothing, a decay, a momentum."""
WORKERS = Range(ge=-1, le=1024)
VALUES = Range(ge=-(10**12), le=10**12)
"""Of pixels, of any type."""
SEED = Range(ge=0, lt=2**31)
