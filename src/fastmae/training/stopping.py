"""When a run stops or saves: signals become a flag, and several processes agree on what to do."""

import signal
import time
from types import FrameType
from typing import Any

import torch

from fastmae.runtime.fabric import Fabric
from fastmae.runtime.workers import STOP_SIGNALS

AGREE_EVERY = 1.0
"""Seconds, about, between two agreements of several processes on whether to save or stop."""


class StopRequest:
    """Turns Ctrl-C and a scheduler's signals into a flag, so that the step in hand is finished and saved.

    A second Ctrl-C is not held back; a second signal of a scheduler, which comes while the run saves itself, is.
    """

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Agreement:
    """Whether to stop and to save: at once in one process; several ask each other, at the same steps, about once a second."""

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        self.asked = time.monotonic()
        self.steps = self.last = 1

    def on(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Called by every process after every step; the answer is the same in all."""
        if self.fabric.world_size == 1:
            return stop, save
        self.steps -= 1
        if self.steps:
            return False, False
        now = time.monotonic()
        votes: Any = self.fabric.all_reduce(
            torch.tensor([float(stop), float(save), now - self.asked], device=self.fabric.device), reduce_op="sum"
        )
        stops, saves, seconds = votes.tolist()
        self.steps = self.last = min(
            2 * self.last, max(1, int(self.last * AGREE_EVERY * self.fabric.world_size / max(seconds, 1e-9)))
        )
        self.asked = now
        return stops > 0, saves > 0
