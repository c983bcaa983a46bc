"""The scalars of the steps, summed on the device until the next log entry."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from fastmae.runtime.fabric import Fabric


class Meter:
    """Sums scalars without waiting for the device, and times the steps between two log entries.

    Args:
        fabric: of the run.
        sums: sums that an earlier call left.
        summed_steps: number of steps in them.
    """

    def __init__(self, fabric: Fabric, sums: Mapping[str, float], summed_steps: int):
        self.fabric, self.summed_steps = fabric, summed_steps
        self.sums = {name: torch.tensor(value, device=fabric.device) for name, value in sums.items()}
        self.timed_steps, self.since = 0, time.monotonic()

    def add(self, scalars: Mapping[str, torch.Tensor]) -> None:
        """Add the scalars of one step."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.summed_steps += 1
        self.timed_steps += 1

    def means(self) -> dict[str, float]:
        """Mean of each scalar over the steps and processes. Every process takes part."""
        return self._reduced(self.summed_steps)

    def totals(self) -> dict[str, float]:
        """Sum of each scalar, averaged over the processes. Every process takes part."""
        return self._reduced(1) if self.sums else {}

    def steps_per_second(self, now: float) -> float:
        """Rate of this call since the last log entry."""
        return self.timed_steps / (now - self.since)

    def restart(self, now: float) -> None:
        """Start the next log entry."""
        self.sums, self.summed_steps, self.timed_steps, self.since = {}, 0, 0, now

    def pause(self, seconds: float) -> None:
        """Leave out seconds that were not spent training."""
        self.since += seconds

    def _reduced(self, divisor: int) -> dict[str, float]:
        values = torch.stack([value.float() for value in self.sums.values()]) / divisor
        reduced: Any = self.fabric.all_reduce(values, reduce_op="mean")
        return dict(zip(self.sums, reduced.tolist(), strict=True))
