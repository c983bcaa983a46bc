"""Opening a file: only a regular one, and of a bounded size where it is read whole.

Reading a named pipe, a socket or a device may never end, and opening one may wait for ever.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from fastmae.errors import InputError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(InputError):
    """The path leads to something else than a file or a folder.

    Args:
        message: one line.
        kind: what it is, as 'a named pipe'.
    """

    def __init__(self, message: str, kind: str = "no file"):  # a loader worker's error is made again of its message
        super().__init__(message)
        self.kind = kind


def kind_of(mode: int) -> str | None:
    """'a named pipe', 'a socket' or 'a device'; None for a regular file or a folder.

    Args:
        mode: `st_mode` of the path.
    """
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading, in binary.

    Args:
        path: links are followed.
        buffering: as in `open`.

    Raises:
        NotRegularError: a pipe, a socket or a device.
        OSError: as `open`, IsADirectoryError for a folder among them.
    """
    _check(path, os.stat(path).st_mode)  # noqa: PTH116 - opening a device can do something by itself
    # A pipe could take the file's place between the two lines; without O_NONBLOCK, opening it would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _check(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: of the file.
        limit: most bytes that such a file may sensibly have.

    Raises:
        InputError: a larger file, or none that is regular.
        OSError: as `open_regular`.
    """
    with open_regular(path, 0) as file:
        # Not by the size alone, which a file of the system (below /proc, say) does not tell.
        blocks, left = [], limit + 1
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            blocks.append(block)
            left -= len(block)
        if left <= 0:
            size = max(os.fstat(file.fileno()).st_size, limit + 1)
            raise InputError(
                f"{path}: has {size / 1e6:.4g} MB, more than the {limit / 1e6:.4g} MB that such a file may have; "
                "is it the file that you meant?"
            )
    return b"".join(blocks)


def _check(path: str | Path, mode: int) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise NotRegularError(f"{path}: is {kind}, not a file; give a regular file", kind)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
