"""Reading one image of a source, which may turn out to be unreadable: the result, or the reason to skip the image."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from fastmae.images.decode import UndecodableError
from fastmae.images.entries import key_of
from fastmae.images.sources import Source

NOT_A_FILE_ERRNOS = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What the system answers when a line of a list names something that isn't a file."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read or decoded.

    Attributes:
        reason: the cause, in one line.
    """

    reason: str


def read_or_skip(source: Source, entry: bytes, read: Callable[[BinaryIO], Result]) -> Result | Skipped:
    """Open an image and return what `read` makes of it, or the reason to skip the image.

    Args:
        source: source of the image.
        entry: entry of the image in the source's list.
        read: turns the open file into the result; raises `UndecodableError` if it can't.

    Raises:
        OSError: a fault of the machine (a failing disk, a lost mount), which says nothing about the image.
    """
    try:
        with source.open(entry) as file:
            return read(file)
    except UndecodableError as error:
        return Skipped(str(error))
    except PermissionError as error:
        return Skipped(f"can't be read: {error.strerror}")
    except FileNotFoundError:
        # A file that the folder listed and that is gone points to a lost mount; a dangling link was listed as such.
        if source.kind == "folder" and not (source.path / key_of(entry)).is_symlink():
            raise
        return Skipped("no such file" if source.kind == "list" else "a link to a file that is not there")
    except OSError as error:
        if error.errno in NOT_A_FILE_ERRNOS:
            return Skipped(f"can't be read: {error.strerror}")
        raise
