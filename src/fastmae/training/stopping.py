"""When a run stops or saves: signals become a flag, and several processes agree on what to do."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from fastmae.runtime.ending import STOP_SIGNALS, is_requested
from fastmae.runtime.fabric import Fabric

SECONDS_BETWEEN_VOTES = 1.0
"""Approximate time between two votes of several processes."""


class BreakOff(KeyboardInterrupt):
    """A signal has broken off what may be broken off: see `StopRequest.breaks_off`."""


class StopRequest:
    """Turns Ctrl-C and a scheduler's signals into a flag, so that the current step is finished and saved.

    A second Ctrl-C interrupts at once. A scheduler's second signal, which comes while the run is being saved, does not.

    Args:
        patience: seconds that a wait goes on after a signal before it is broken off.
    """

    def __init__(self, patience: float = 0.0):
        self.patience = patience
        self.requested = False
        self._requested_at = math.inf
        self._breaks_off_after = math.inf
        self._reminder: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread receives signals, and only it may ask for them.
        numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        if is_requested():  # a library has dropped the interruption before
            self.requested, self._requested_at = True, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder.join()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def breaks_off(self, at_once: bool = False) -> Iterator[None]:
        """What is done within may be broken off by a signal: it waits for something, or can be done again.

        Args:
            at_once: not only after `patience`.

        Raises:
            BreakOff: a signal has come, also one that came before.
        """
        self._breaks_off_after = 0.0 if at_once else self.patience
        try:
            self._break_off_if_due()
            yield
        finally:
            self._breaks_off_after = math.inf

    def _break_off_if_due(self) -> None:
        if time.monotonic() - self._requested_at >= self._breaks_off_after:
            raise BreakOff

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
            if self.patience:
                self._reminder = threading.Timer(self.patience, _remind)
                self._reminder.daemon = True
                self._reminder.start()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        self._break_off_if_due()


def _remind() -> None:
    """Wake up the main thread, whatever it waits in, with a signal that asks for nothing new."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


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
