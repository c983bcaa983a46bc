"""How a command ends on a signal: within seconds, whatever it does or waits for.

Ctrl-C, and what a scheduler sends, interrupt what the main thread does. Python tells it of a signal only between two of
its own operations, so a thread watches too: whoever is still there after `LIMIT` seconds is ended. A training run
handles the signals itself (`training.stopping`), and the limit waits while it completes a step or saves.

Only the command line calls `heed_signals`. Light on imports: this is set up before torch is there.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals on which a run saves itself and stops: Ctrl-C, and those that schedulers send before they take a machine."""
INTERRUPTED = 130
LIMIT = 7.0
"""Seconds that a command gets to end by itself."""
AGAIN = 2.0
"""Seconds after which a command that goes on is interrupted again."""
POLL = 0.1


class _Ending:
    """What is known about the end of this process.

    Attributes:
        command: what has been called, for the line.
        code: the exit code once it is reported; None before.
        requested: whether a signal has asked for the end.
        interrupted: whether that has interrupted the main thread.
        dropped: whether Python has dropped the interruption, as it does in a finalizer.
        unlimited: how many parts of the program must not be cut short now.
        at_once: how many parts of the program need not end by themselves.
        children: ends the processes that this one has started, for each kind of them.
    """

    def __init__(self) -> None:
        self.command = "fastmae"
        self.code: int | None = None
        self.requested = False
        self.interrupted = False
        self.dropped = False
        self.unlimited = 0
        self.at_once = 0
        self.children: list[Callable[[], object]] = []


_ending = _Ending()


def heed_signals() -> None:
    """From now on, a stop signal raises KeyboardInterrupt in the main thread, and the limit holds.

    A signal that this process was started to ignore, as `nohup` and shells do, stays ignored.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if hasattr(os, "register_at_fork"):  # Windows can wake up nothing but a socket
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        sys.unraisablehook = _unraisable
        os.register_at_fork(after_in_child=_leave_signals_to_the_parent)
        threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def begin(command: str) -> None:
    """The command, as it stands at the beginning of its lines."""
    _ending.command, _ending.code = command, None


def is_requested() -> bool:
    """Whether a signal has asked for the end: whatever fails then does so because of it."""
    return _ending.requested


def report(code: int) -> None:
    """The command's outcome was reported, and this will be its exit code."""
    _ending.code = code


def leave_children_to(end: Callable[[], object]) -> None:
    """How to end processes that were started, if this one has to go at once."""
    _ending.children.append(end)


def finish() -> None:
    """All is done: a signal now must not change the exit code, but still ends a process that does not get away."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def unlimited() -> contextlib.AbstractContextManager[None]:
    """The limit waits: this must be completed, such as a run being saved."""
    return _counted("unlimited")


def ends_at_once() -> contextlib.AbstractContextManager[None]:
    """There is no limit to wait for: nothing is to be completed or put away, only to be waited for."""
    return _counted("at_once")


@contextlib.contextmanager
def _counted(parts: str) -> Iterator[None]:
    """One more of these parts of the program runs."""
    setattr(_ending, parts, getattr(_ending, parts) + 1)
    try:
        yield
    finally:
        setattr(_ending, parts, getattr(_ending, parts) - 1)


def _note(_: int, __: FrameType | None) -> None:
    _ending.requested = True


def _interrupt(number: int, _: FrameType | None) -> None:
    if _ending.at_once and hasattr(os, "register_at_fork"):  # the thread that watches ends this process
        return
    is_first = not _ending.interrupted
    _ending.interrupted = _ending.requested = True
    if is_first or number == signal.SIGINT:  # a scheduler's second signal must not disturb the end
        raise KeyboardInterrupt


def _unraisable(dropped: "sys.UnraisableHookArgs") -> None:
    """Instead of Python's own report of an exception that it drops.

    Once the end is requested, others follow from it: a finalizer meets an object that was only half made.
    """
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        _ending.dropped = True
    elif not _ending.requested:
        sys.__unraisablehook__(dropped)


def _leave_signals_to_the_parent() -> None:
    """In a fork: what reaches it must not wake up its parent, nor end in a traceback."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (_interrupt, _note):
                signal.signal(number, signal.SIG_DFL)


def _watch(reader: int) -> None:
    while (number := os.read(reader, 1)[0]) not in STOP_SIGNALS:
        continue  # SIGCHLD, say
    _ending.requested = True
    end, again = time.monotonic() + LIMIT, time.monotonic() + AGAIN
    while time.monotonic() < end and not _ending.at_once:
        time.sleep(POLL)
        if _ending.unlimited:
            end, again = time.monotonic() + LIMIT, time.monotonic() + AGAIN
        elif _ending.dropped or time.monotonic() > again:
            again = time.monotonic() + AGAIN
            _interrupt_again(number)
    _end_now()


def _interrupt_again(number: int) -> None:
    if _ending.code is None and signal.getsignal(number) is _interrupt:
        _ending.dropped = _ending.interrupted = False
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _end_now() -> None:
    if _ending.code is None and os.environ.get("LOCAL_RANK", "0") == "0":
        shown_again = "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""  # the cursor
        with contextlib.suppress(OSError):
            os.write(2, f"{shown_again}{_ending.command}: interrupted\n".encode())
    if "multiprocessing.process" in sys.modules:
        for process in sys.modules["multiprocessing.process"].active_children():
            process.kill()
    for end in _ending.children:
        end()
    os._exit(INTERRUPTED if _ending.code is None else _ending.code)
