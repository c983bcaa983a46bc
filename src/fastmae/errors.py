"""The two ways in which a command ends early, and the exit code of each.

A message is one line: it names the file or the option, the cause, and the way out.
"""

from typing import Any


def first_line(error: BaseException) -> str:
    """A library's message, cut to what fits into one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


class InputError(ValueError):
    """What the user gave can't be used as it is: exit code 2."""


class OneProcessError(InputError):
    """Met by one of several processes alone, which therefore says so itself; of what all of them meet, the first one speaks."""


class InterruptedRunError(Exception):
    """The user or the scheduler stopped the command; its work is saved: exit code 130."""


class FailedCheckError(Exception):
    """The input was fine, but what came of it is not (a loss that is not a number, a damaged store): exit code 1.

    Args:
        message: in one line.
        result: the command's JSON all the same.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None):
        super().__init__(message)
        self.result = result
