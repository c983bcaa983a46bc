"""The first thing that the command does, before anything is imported that takes time or opens a file."""

import os
import signal
import sys
from types import FrameType


def prepare() -> None:
    """Make Ctrl-C end this process silently from now on, and give it the standard streams that it was started without.

    A closed stream's number would go to the next file that is opened, and what is printed would get into that file.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, as behind nohup
        signal.signal(signal.SIGINT, _leave)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - until the end


def begin() -> None:
    """All is imported: from now on, Ctrl-C is a KeyboardInterrupt, which lets the command tidy up.

    An import that is interrupted by an exception may fail in a way of its own, or go on without a part.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_: int, __: FrameType | None) -> None:
    os._exit(130)
