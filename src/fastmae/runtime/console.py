"""What the command line shows of the package's log: messages on stdout, warnings and progress on stderr.

The package itself only logs, to the logger "fastmae" and those below it. `show` is called by `fastmae.cli` alone.
"""

import logging
import sys

PROGRESS = "fastmae.runtime.progress"
"""The logger of progress lines."""


class ConsoleHandler(logging.Handler):
    """Writes each message as it is. The streams are looked up at every message, so they can be redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message and flush. One that can't be written (the disk of a log file is full) stops no work."""
        to_stderr = record.levelno >= logging.WARNING or record.name == PROGRESS
        try:
            print(record.getMessage(), file=sys.stderr if to_stderr else sys.stdout, flush=True)
        except BrokenPipeError:  # as in `fastmae ... | head`: the reader has what it wanted
            raise
        except OSError:
            pass


def show() -> None:
    """Show the log from now on. A second call changes nothing."""
    logger = logging.getLogger("fastmae")
    if not is_shown():
        logger.addHandler(ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def is_shown() -> bool:
    """Whether this process is a command that shows its log, so that it may draw a progress bar too."""
    return any(isinstance(handler, ConsoleHandler) for handler in logging.getLogger("fastmae").handlers)
