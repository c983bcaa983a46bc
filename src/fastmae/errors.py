"""The ways in which a command ends early, and the exit code of each.

A message is one line: it names the file or the option, the cause, and the way out.
"""

import errno
from collections.abc import Iterator
from typing import Any

OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory")
"""What torch says when the machine's memory is full, in an error of no type of its own."""


def first_line(error: BaseException) -> str:
    """A library's message, cut to what fits into one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def add_note(error: BaseException, note: str) -> None:
    """Say one thing more in the line of an error that is on its way out, such as what was saved."""
    notes: Any = getattr(error, "__notes__", [])  # as Python's own `add_note`, which came with 3.11
    error.__notes__ = [*notes, note]  # type: ignore[attr-defined]  # on 3.10


def notes_of(error: BaseException) -> Iterator[str]:
    """The notes of an error and of those that it was made from."""
    link: BaseException | None = error
    while link is not None:
        yield from getattr(link, "__notes__", ())
        link = link.__cause__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine, or of the device, was full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be loaded
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def os_message(error: OSError) -> str:
    """What the system refused, as a line: the file, the cause and, where the disk is full, the way out."""
    path = f"{error.filename}: " if error.filename is not None else ""
    way_out = "; free some space and give the same command again, it continues" if is_full_disk(error) else ""
    return f"{path}{error.strerror or error}{way_out}"


def is_full_disk(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of a file's size is used up."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
