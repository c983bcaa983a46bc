"""When a run stops or saves: signals become a flag, and several processes agree on what to do."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from fastmae.runtime.fabric import Fabric
from fastmae.runtime.workers import STOP_SIGNALS

SECONDS_BETWEEN_VOTES = 1.0
"""Approximate time between two votes of several processes."""


class StopRequest:
    """Turns Ctrl-C and a scheduler's signals into a flag, so that the current step is finished and saved.

    A second Ctrl-C interrupts at once. A scheduler's second signal, which comes while the run is being saved, does not.
    """

    def __enter__(self) -> "StopRequest":
        self.requested = False
        # Only the main thread receives signals, and only it may ask for them.
        numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Vote:
    """Whether to stop, and whether to save. Several processes vote at the same steps, about once a second.

    Args:
        fabric: of the run.
    """

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        self.last_vote = time.monotonic()
        self.steps_left = self.interval = 1

    def after_step(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Called by every process after every step. The answer is the same in all of them.

        Args:
            stop: whether this process wants to stop.
            save: whether it wants to save.
        """
        if self.fabric.world_size == 1:
            return stop, save
        self.steps_left -= 1
        if self.steps_left:
            return False, False
        now = time.monotonic()
        votes: Any = self.fabric.all_reduce(
            torch.tensor([float(stop), float(save), now - self.last_vote], device=self.fabric.device), reduce_op="sum"
        )
        stops, saves, seconds = votes.tolist()
        steps_per_interval = self.interval * SECONDS_BETWEEN_VOTES * self.fabric.world_size / max(seconds, 1e-9)
        self.steps_left = self.interval = min(2 * self.interval, max(1, int(steps_per_interval)))
        self.last_vote = now
        return stops > 0, saves > 0
