"""A file appears whole or not at all: written aside, flushed to the disk, renamed.

Shards, indexes, checkpoints and JSON all go through here, so that a kill or a full disk at any moment leaves either
the old file or the new one.
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

PART_SUFFIX = ".part"
"""What a file is called while it is written, after its writer: NAME.HOST.PID.part. Left behind by a kill, it is rubbish."""
ABANDONED_AFTER = 24 * 3600
"""Seconds after which a part written by another machine counts as left behind."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in `path`'s place.

    Args:
        path: the file to appear; replaced when there already.
        write: gets the path to write to.

    Raises:
        OSError: as from `write` (a full disk, say); `path` is then as it was, and nothing is left beside it.
    """
    aside = path.with_name(f"{path.name}.{_host()}.{os.getpid()}{PART_SUFFIX}")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())  # some writers make files that only their owner may read
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a failed write() does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _flush_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Put a file in its place unless one is there already: of several processes that come with theirs, the first one's stays.

    Raises:
        OSError: a full disk, say; nothing is left beside `path`.
    """
    aside = path.with_name(f"{path.name}.{_host()}.{os.getpid()}{PART_SUFFIX}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)  # fails where `path` exists; a rename would replace it
    except FileExistsError:
        return
    except OSError:
        if not aside.exists() or path.exists() or aside.stat().st_size != len(data):  # not for the want of hard links
            raise
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a rename or a link in it last."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def holds_anything(folder: Path) -> bool:
    """Whether a folder holds more than what a killed writer left half-written."""
    return any(not path.name.endswith(PART_SUFFIX) for path in folder.iterdir())


def remove_parts(folder: Path) -> None:
    """Delete what killed writers left half-written in `folder`; what a living one is writing stays."""
    for part in folder.glob(f"*{PART_SUFFIX}"):
        if _is_abandoned(part):
            part.unlink(missing_ok=True)


def _is_abandoned(part: Path) -> bool:
    written_by = re.fullmatch(r".+\.([^.]+)\.(\d+)\.part", part.name)
    if written_by is None:
        return False
    host, pid = written_by.groups()
    if host != _host():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - part.stat().st_mtime > ABANDONED_AFTER
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process
        return False
    return int(pid) == os.getpid()  # this process is writing nothing while it cleans


def _host() -> str:
    return socket.gethostname().replace(".", "-")
