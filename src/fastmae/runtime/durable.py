"""A file appears whole or not at all: it is written beside its path, flushed to disk, and renamed.

Shards, indexes, checkpoints and JSON files are all written this way. A kill or a full disk leaves either the old file
or the new one.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmae.runtime.ownership import check_owner, is_lock
from fastmae.runtime.processes import is_running

PART_SUFFIX = ".part"
"""Suffix of a half-written file, NAME.HOST.PID.part, which names its writer. A killed writer leaves it behind."""
ABANDONED_AFTER = 24 * 3600
"""Age in seconds from which another machine's part counts as left behind."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a part beside `path`, then rename it to `path`.

    Args:
        path: the file to write; an existing file is replaced.
        write: writes the content to the path that it gets.

    Raises:
        OSError: `write` failed (on a full disk, say). `path` is unchanged, and no part is left.
        InputError: another process has taken over the folder meanwhile (`ownership`). As before.
    """
    part = _part_of(path)
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())  # some writers create files that only their owner may read
        check_owner(path)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # an error of write() does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _flush_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file unless it exists: if several processes write the same file, the first one's stays.

    Raises:
        OSError: a full disk, say; no part is left.
        InputError: as `write_whole`.
    """
    check_owner(path)
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # fails if `path` exists, unlike a rename
    except FileExistsError:
        return
    except OSError:
        # A file system without hard links: the part is complete, and `path` does not exist.
        if not part.exists() or path.exists() or part.stat().st_size != len(data):
            raise
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def holds_anything(folder: Path) -> bool:
    """Whether a folder holds anything but half-written files and locks."""
    return any(not path.name.endswith(PART_SUFFIX) and not is_lock(path.name) for path in folder.iterdir())


def remove_parts(folder: Path) -> None:
    """Delete the parts in `folder` that killed writers left; those of running writers stay."""
    for part in folder.glob(f"*{PART_SUFFIX}"):
        if _is_abandoned(part):
            with contextlib.suppress(OSError):  # gone, or a folder of that name: it is in nobody's way
                part.unlink()


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.{_host()}.{os.getpid()}{PART_SUFFIX}")


def _is_abandoned(part: Path) -> bool:
    name = re.fullmatch(r".+\.([^.]+)\.(\d+)\.part", part.name)
    if name is None:
        return False
    host, pid = name.groups()
    if host != _host():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - part.stat().st_mtime > ABANDONED_AFTER
        return False
    # This process does not write while it cleans up.
    return int(pid) == os.getpid() or not is_running(int(pid))


def _flush_folder(folder: Path) -> None:
    """Flush the folder itself to disk, so that a rename or link in it lasts."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _host() -> str:
    return socket.gethostname().replace(".", "-")
