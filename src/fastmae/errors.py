"""The ways in which a command ends early, and the exit code of each.

A message is one line: it names the file or the option, the cause, and the way out.
"""

from typing import Any


def first_line(error: BaseException) -> str:
    """A library's message, cut to what fits into one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


class InputError(ValueError):
    """The input can't be used as it is. Exit code 2."""


class OneProcessError(InputError):
    """An error that only one of several processes meets, so that process must report it itself."""


class InterruptedRunError(Exception):
    """The user or the scheduler stopped the command, and its work is saved. Exit code 130."""


class FailedCheckError(Exception):
    """The input was fine, but a check failed: the loss is not a number, say, or a store is damaged. Exit code 1.

    Args:
        message: one line.
        result: the command's JSON, which is printed all the same.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None):
        super().__init__(message)
        self.result = result
