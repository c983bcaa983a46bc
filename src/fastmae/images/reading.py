"""Reading one image, which may turn out to be unreadable: the result, or why the image is skipped or refused."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from fastmae.errors import InputError
from fastmae.images.decode import UndecodableError
from fastmae.images.entries import key_of
from fastmae.images.folders import LEADS_NOWHERE_ERRNOS
from fastmae.images.sources import Source
from fastmae.outside.regular_file import NotRegularError, open_regular

NOT_A_FILE_ERRNOS = {errno.EISDIR, *LEADS_NOWHERE_ERRNOS}
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
        InputError: there is not enough memory to decode it.
    """
    try:
        with source.open(entry) as file:
            return read(file)
    except UndecodableError as error:
        return Skipped(str(error))
    except NotRegularError as error:
        return Skipped(f"is {error.kind}, not a file")
    except MemoryError:
        raise _out_of_memory(key_of(entry)) from None
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


def read_or_refuse(path: Path, read: Callable[[BinaryIO], Result], way_out: str) -> Result:
    """Open an image file and return what `read` makes of it.

    Args:
        path: of the file.
        read: turns the open file into the result; raises `UndecodableError` if it can't.
        way_out: what the user can do with an image that can't be read; ends the message.

    Raises:
        InputError: the image can't be read, or there is not enough memory to decode it.
        OSError: the file can't be opened.
    """
    try:
        with open_regular(path) as file:
            return read(file)
    except UndecodableError as error:
        raise InputError(f"{path}: {error}; {way_out}") from error
    except NotRegularError as error:
        raise InputError(f"{path}: is {error.kind}, not a file; {way_out}") from error
    except MemoryError:
        raise _out_of_memory(path) from None


def _out_of_memory(image: object) -> InputError:
    return InputError(f"{image}: not enough memory to decode it; use fewer --workers, or a machine with more memory")
