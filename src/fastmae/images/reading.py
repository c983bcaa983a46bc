"""An image that may be unreadable: what was read from it, or why it is skipped."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from fastmae.images.decode import UndecodableError
from fastmae.images.entries import key_of
from fastmae.images.sources import Source

NOT_A_FILE = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What the system answers to a line of a list that names no file."""


Image = TypeVar("Image")


@dataclass(frozen=True)
class Skipped:
    """An image that could not be decoded, and why."""

    reason: str


def read_or_skip(source: Source, entry: bytes, read: Callable[[BinaryIO], Image]) -> Image | Skipped:
    """What `read` makes of an image's open file; or why the image is to be skipped.

    Raises:
        OSError: the machine's fault (a failing disk, a lost mount), which says nothing about the image.
    """
    try:
        with source.open(entry) as file:
            return read(file)
    except UndecodableError as error:
        return Skipped(str(error))
    except PermissionError as error:
        return Skipped(f"can't be read: {error.strerror}")
    except FileNotFoundError:
        if source.kind == "folder" and not (source.path / key_of(entry)).is_symlink():
            raise
        return Skipped("no such file" if source.kind == "list" else "a link to a file that is not there")
    except OSError as error:
        if error.errno in NOT_A_FILE:
            return Skipped(f"can't be read: {error.strerror}")
        raise
