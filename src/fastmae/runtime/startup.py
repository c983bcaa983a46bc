"""The first thing that the command does, before anything is imported that takes time or opens a file."""

import os
import signal
import sys
from types import FrameType

from fastmae.runtime import ending


def prepare() -> None:
    """Make stop signals end this process silently from now on, and open the standard streams that it lacks.

    A closed stream's number would go to the next file that is opened, and what is printed would get into that file.
    """
    for stop in ending.STOP_SIGNALS:
        if signal.getsignal(stop) in (signal.SIG_DFL, signal.default_int_handler):  # not if ignored, as behind nohup
            signal.signal(stop, _leave)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - until the end


def begin() -> None:
    """All is imported: from now on, a stop signal is a KeyboardInterrupt, which lets the command tidy up.

    An import that is interrupted by an exception may fail in a way of its own, or go on without a part.
    """
    if any(signal.getsignal(stop) is _leave for stop in ending.STOP_SIGNALS):
        ending.heed_signals()


def _leave(_: int, __: FrameType | None) -> None:
    os._exit(ending.INTERRUPTED)
