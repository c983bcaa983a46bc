"""One file from behind a URL, in bounded bytes and a bounded time. fsspec connects; every error names the URL.

Whatever a server says about a file, no more is taken of it than the caller allows, and what falls behind a least rate
is given up. Failed transfers are tried again; answers that no retry can mend are not.
"""

import asyncio
import concurrent.futures
import io
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec.asyn
import fsspec.core

from fastmae.errors import InputError, first_line, is_full_disk
from fastmae.outside.regular_file import open_regular
from fastmae.tokens.access import refusal

Result = TypeVar("Result")

RETRY_AFTER = (0.2, 1.0, 3.0)
"""Seconds to wait before each further attempt at a failed transfer."""
LEAST_RATE = 10_000
"""Bytes per second below which a transfer counts as failed. A shard of 100 MB would take three hours: no training could
wait for it. Yet 100 downloads at once over a line of 10 Mbit/s are still faster."""
SLOW_AFTER = 30.0
"""Seconds over which the rate is measured, again and again until the file is complete; the first ones include the
connection. A pause of a network that recovers is shorter."""
BLOCK = 5 << 20
"""Most bytes that are read at once."""
RANGE, RANGES = 16 << 20, 4
"""Bytes of a request to object storage, and requests at the same time. As fast as a single stream at least."""
PAGE_HEAD = 64
"""Bytes at the beginning of an answer by which a web page is recognised."""
CHATTY = {"gs": ("gcsfs", "gcsfs.retry"), "gcs": ("gcsfs", "gcsfs.retry"), "hf": ("huggingface_hub.utils._http",)}
"""Protocol -> loggers of its package that report what fastmae reports itself, and attempts that are repeated."""

# fsspec runs its event loop in a thread, and threads do not survive a fork: a child needs a loop of its own.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


class WrongSizeError(InputError):
    """The URL has a file of another size than it may have."""


class _TooSlowError(Exception):
    """A transfer fell behind `LEAST_RATE`."""

    def __init__(self) -> None:
        super().__init__(f"less than {LEAST_RATE * SLOW_AFTER / 1e3:.4g} kB came in {SLOW_AFTER:g} s")


def read(url: str, name: str, most: int) -> bytes:
    """The bytes of a small remote file.

    Args:
        url: the store's folder.
        name: of the file, within the store.
        most: bytes that such a file may have.

    Raises:
        access.MissingFileError: no such file, or no permission.
        InputError: a larger file, a web page instead of the file, a server that can't be reached or is too slow, or the
            package for this kind of URL is missing.
    """

    def fetch() -> bytes:
        out = io.BytesIO()
        _receive(url, name, _Arrival(f"{url}/{name}", out, most))
        return out.getvalue()

    return with_retries(fetch, f"{url}/{name}")


def download(url: str, name: str, file: Path, size: int) -> None:
    """Download a remote file.

    Args:
        url: the store's folder.
        name: of the file, within the store.
        file: an existing local file, written from its beginning; never more than `size` bytes.
        size: bytes that the remote file must have.

    Raises:
        InputError: as `read`, or a file of another size.
        OSError: the local disk is full.
    """

    def fetch() -> None:
        with file.open("r+b") as out:
            _receive(url, name, _Arrival(f"{url}/{name}", out, size, exact=True))

    with_retries(fetch, f"{url}/{name}")


def read_head(url: str, name: str, count: int) -> bytes:
    """The first bytes of a remote file; fewer where it is shorter.

    Raises:
        InputError: as `read`.
    """

    def fetch() -> bytes:
        files, root = file_system(os.getpid(), url)
        return bytes(files.cat_file(f"{root}/{name}", start=0, end=count))

    return with_retries(fetch, f"{url}/{name}")


@cache
def file_system(pid: int, url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, made once in each process, and fsspec's own name for that URL.

    A forked child keeps its parent's entry too and never closes it: that would close the parent's connections.

    Raises:
        InputError: an unknown kind of URL, or one whose package is not installed.
    """
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    way_out = "give a folder, or a URL of https://, s3://, gs:// or hf://"
    if "::" in url:  # fsspec would download whole files of any size into a cache of its own
        raise InputError(f"{url}: is a chain of URLs; {way_out}")
    try:
        if protocol in {"http", "https"}:
            import aiohttp  # noqa: PLC0415 - an optional dependency, used for HTTP alone

            # The least rate bounds each transfer. aiohttp's own limit of five minutes would end large ones.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None)}
        for name in CHATTY.get(protocol, ()):  # they log every failure; ours is one line, once it is final
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None)
        with_it = "'fastmae[remote]'" if package == "aiohttp" else package
        need = (
            f"the package {package}; install it (pip install {with_it})" if package else f"more ({first_line(error)})"
        )
        raise InputError(f"{url}: to read {protocol}:// takes {need}") from error
    except ValueError as error:
        raise InputError(f"{url}: {first_line(error)}; {way_out}") from error


@dataclass
class _Arrival:
    """A file on its way here, in one attempt.

    Attributes:
        url: of the file.
        out: what it is written to.
        most: bytes that may come.
        exact: whether so many must come.
        arrived: bytes that have come.
    """

    url: str
    out: BinaryIO
    most: int
    exact: bool = False
    arrived: int = 0

    @property
    def next_block(self) -> int:
        """Bytes to ask for: when all are there, one more, by which a longer file is noticed."""
        return min(BLOCK, self.most - self.arrived) or 1

    def take(self, block: bytes) -> None:
        """Write what came; nothing of a block that exceeds the limit.

        Raises:
            InputError: more has come than the file may have.
        """
        if self.arrived + len(block) > self.most:
            raise self.refused("more bytes come")
        self.out.write(block)
        self.arrived += len(block)

    def check_told(self, size: int) -> None:
        """Refuse a file by the size that the server tells."""
        if size > self.most or (self.exact and size != self.most):
            raise self.refused(f"has {size} bytes")

    def check_end(self) -> None:
        """Raise an EOFError unless all bytes are there."""
        if self.exact and self.arrived != self.most:
            raise EOFError(f"{self.arrived} bytes came instead of {self.most}")

    def refused(self, what: str) -> WrongSizeError:
        """The error of a file of another size."""
        if self.exact:
            way_out = "give the command again if the store was replaced just now, or copy the store there again"
            return WrongSizeError(f"{self.url}: {what}, not the {self.most} of the store's manifest; {way_out}")
        most = f"the {self.most / 1e6:.4g} MB that such a file may have"
        return WrongSizeError(f"{self.url}: {what}, not at most {most}; check that a token store lies there")


def _receive(url: str, name: str, arrival: _Arrival) -> None:
    files, root = file_system(os.getpid(), url)
    path, protocol = f"{root}/{name}", url.partition("://")[0]
    if protocol in {"http", "https"}:
        _waited_for(files.loop, _receive_http(files, path, arrival), arrival)
    elif files.async_impl and arrival.exact:
        _receive_ranges(files, path, arrival)
    elif files.async_impl:
        arrival.take(files.cat_file(path, start=0, end=arrival.most + 1, timeout=_time_for(arrival.most)))
    else:
        _receive_opened(files, path, arrival)
    arrival.check_end()


def _waited_for(loop: asyncio.AbstractEventLoop, transfer: Coroutine[Any, Any, None], arrival: _Arrival) -> None:
    """Wait for a transfer that runs on fsspec's loop, and end it when it is too slow or this thread is interrupted."""
    future, before = asyncio.run_coroutine_threadsafe(transfer, loop), 0
    try:
        while not concurrent.futures.wait([future], SLOW_AFTER).done:
            if arrival.arrived - before < LEAST_RATE * SLOW_AFTER:
                raise _TooSlowError
            before = arrival.arrived
        future.result()
    finally:
        future.cancel()


async def _receive_http(files: Any, url: str, arrival: _Arrival) -> None:
    import aiohttp  # noqa: PLC0415

    session = await files.set_session()
    # A compressed answer could unfold to any size, so none is asked for, and none is unpacked.
    headers = {**files.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    options = {**files.kwargs, "headers": headers, "auto_decompress": False}
    try:
        answer = await session.get(files.encode_url(url), **options)
    except aiohttp.TooManyRedirects as error:
        raise InputError(f"{arrival.url}: the server redirects without end; check the address") from error
    except (aiohttp.InvalidURL, getattr(aiohttp, "RedirectClientError", ValueError)) as error:
        cause = f"leads to an address that is no http:// or https:// ({first_line(error)})"
        raise InputError(f"{arrival.url}: {cause}; check the address") from error
    async with answer:
        answer.raise_for_status()
        first = b""
        while len(first) < PAGE_HEAD and (block := await answer.content.read(PAGE_HEAD - len(first))):
            first += block
        if first.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
            way_out = "check the address, and whether the server asks for a login"
            raise InputError(f"{arrival.url}: the server answered with a web page, not the file; {way_out}")
        encoding = answer.headers.get("Content-Encoding", "").lower()
        if encoding not in {"", "identity"}:
            way_out = "have it serve the store's files as they are"
            raise InputError(f"{arrival.url}: the server sends it compressed ({encoding[:20]}); {way_out}")
        if answer.content_length is not None:
            arrival.check_told(answer.content_length)
        block = first
        while block:
            arrival.take(block)
            block = await answer.content.read(arrival.next_block)


def _receive_ranges(files: Any, path: str, arrival: _Arrival) -> None:
    """From object storage, several ranges at a time. The last one may have one byte more, to notice a longer file."""
    starts = list(range(0, arrival.most, RANGE))
    ends = [*starts[1:], arrival.most + 1]
    for first in range(0, len(starts), RANGES):
        now = slice(first, first + RANGES)
        paths, patience = [path] * len(starts[now]), _time_for(RANGE * RANGES)
        for block in files.cat_ranges(paths, starts[now], ends[now], on_error="raise", timeout=patience):
            arrival.take(block)


def _receive_opened(files: Any, path: str, arrival: _Arrival) -> None:
    """From a file system that can't be interrupted: it is given up between two blocks."""
    start = time.monotonic()
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    # With a block size of 0, the hub sends a file as one stream. Else each block is a request.
    options = {"block_size": 0} if "hf" in protocols else {}
    with open_regular(path) if "file" in protocols else files.open(path, "rb", **options) as source:
        while block := source.read(arrival.next_block):
            arrival.take(block)
            if time.monotonic() - start > _time_for(arrival.arrived):
                raise _TooSlowError


def _time_for(count: int) -> float:
    """Seconds in which so many bytes must have come."""
    return SLOW_AFTER + count / LEAST_RATE


def with_retries(transfer: Callable[[], Result], url: str, what: str = "fetched") -> Result:
    """Run a transfer, again after each pause of `RETRY_AFTER`, unless its failure is one that no retry can mend.

    Raises:
        InputError: the last attempt has failed too, or there was no use in another one.
        OSError: the local disk is full.
    """
    for pause in (*RETRY_AFTER, None):
        try:
            return transfer()
        except Exception as error:
            _raise_if_lasting(error, url)
            if pause is None:
                attempts = f"{first_line(error)}, tried {len(RETRY_AFTER) + 1} times"
                raise InputError(f"{url}: can't be {what} ({attempts}); check the address and the network") from error
            time.sleep(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _raise_if_lasting(error: Exception, url: str) -> None:
    if isinstance(error, InputError) or (isinstance(error, OSError) and is_full_disk(error)):
        raise error
    refused = refusal(error, url)
    if refused is not None:
        raise refused from error
