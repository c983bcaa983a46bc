"""One file from behind a URL, read with fsspec. Failed transfers are tried again; every error names the URL."""

import errno
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec.asyn
import fsspec.core

from fastmae.errors import InputError, first_line

Result = TypeVar("Result")

RETRY_AFTER = (0.2, 1.0, 3.0)
"""Seconds to wait before each further attempt at a failed transfer."""
STALLED_AFTER = 60.0
"""Seconds without a byte after which an HTTP transfer counts as failed."""
MISSING, FORBIDDEN = (404, 410), (401, 403)
"""HTTP status codes."""
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# fsspec runs its event loop in a thread, and threads do not survive a fork: a child needs a loop of its own.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


class MissingFileError(InputError):
    """The URL has no such file, or we may not read it: a bucket that can't be listed says 'forbidden' for both."""


def file_size(url: str, name: str) -> int | None:
    """Size of a remote file in bytes, or None where the server does not tell.

    Raises:
        MissingFileError: no such file, or no permission.
        InputError: the server can't be reached, or the package for this kind of URL is missing.
    """

    def ask() -> int | None:
        files, root = file_system(os.getpid(), url)
        try:
            return files.info(f"{root}/{name}").get("size")
        except FileNotFoundError as error:
            # Over HTTP, fsspec raises FileNotFoundError for every failure; the true error is its cause.
            if url.startswith("http") and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise

    return _with_retries(ask, f"{url}/{name}")


def download(url: str, name: str, file: Path, size: int | None) -> int:
    """Download a remote file and return its size in bytes.

    Args:
        url: the store's folder.
        name: of the file, within the store.
        file: local path to write to; overwritten when it exists.
        size: bytes that must arrive, or None when unknown.

    Raises:
        InputError: as `file_size`.
        OSError: the local disk is full.
    """

    def fetch() -> int:
        files, root = file_system(os.getpid(), url)
        try:
            files.get_file(f"{root}/{name}", str(file))
        except OSError as error:
            if error.errno in DISK_IS_FULL:  # a failed write() does not know its file
                raise OSError(error.errno, error.strerror, str(file)) from error
            raise
        arrived = file.stat().st_size
        if size is not None and arrived != size:
            raise EOFError(f"{arrived} bytes came instead of {size}")
        return arrived

    return _with_retries(fetch, f"{url}/{name}")


@cache
def file_system(pid: int, url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, made once in each process, and fsspec's own name for that URL.

    A forked child keeps its parent's entry too and never closes it: that would close the parent's connections.

    Raises:
        InputError: an unknown kind of URL, or one whose package is not installed.
    """
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in {"http", "https"}:
            import aiohttp  # noqa: PLC0415 - an optional dependency, used for HTTP alone

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=STALLED_AFTER)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None)
        need = (
            f"the package {package}; install it (pip install {package})" if package else f"more ({first_line(error)})"
        )
        raise InputError(f"{url}: to read {protocol}:// takes {need}") from error
    except ValueError as error:
        way_out = "give a folder, or a URL of https://, s3://, gs:// or hf://"
        raise InputError(f"{url}: {first_line(error)}; {way_out}") from error


def _with_retries(transfer: Callable[[], Result], url: str) -> Result:
    """Run a transfer, again after each pause of `RETRY_AFTER`, unless its failure is one that no retry can mend."""
    for pause in (*RETRY_AFTER, None):
        try:
            return transfer()
        except Exception as error:
            _raise_if_lasting(error, url)
            if pause is None:
                attempts = f"{first_line(error)}, tried {len(RETRY_AFTER) + 1} times"
                raise InputError(f"{url}: can't be fetched ({attempts}); check the address and the network") from error
            time.sleep(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _raise_if_lasting(error: Exception, url: str) -> None:
    if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno in DISK_IS_FULL):
        raise error
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in MISSING:
        way_out = "check the address, and that the whole store was copied there"
        raise MissingFileError(f"{url}: no such file; {way_out}") from error
    if isinstance(error, PermissionError) or status in FORBIDDEN:
        protocol = url.partition("://")[0]
        raise MissingFileError(f"{url}: no permission; give the credentials that {protocol}:// takes") from error
