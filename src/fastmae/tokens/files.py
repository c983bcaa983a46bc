"""Where a store's files are: in a folder, or behind a URL and read through a cache of whole files on this machine.

Each file is downloaded beside its place under a lock of its own, so it is fetched once. `cache` bounds what they take.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastmae.errors import InputError
from fastmae.tokens import transfer
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.cache import BoundedFolder, NoRoomError, lock_of
from fastmae.tokens.format import (
    LARGEST_DESCRIPTION,
    LARGEST_SCALES,
    MANIFEST_FILE,
    SCALES_FILE,
    SHARDS_FOLDER,
    STORE_FILE,
)
from fastmae.tokens.manifest import LARGEST_MANIFEST

PREFETCH_THREADS = 2
PREFETCH_AT_MOST = 128
"""Files that one call of `prefetch` looks ahead; the rest is left to the next call."""
MOST_BYTES = {SCALES_FILE: LARGEST_SCALES, STORE_FILE: LARGEST_DESCRIPTION, MANIFEST_FILE: LARGEST_MANIFEST}
"""Bytes that a file may have which is fetched before the manifest tells its size."""
OPENING = "opening"
"""Folder, beside those of the store's versions, of the files that were fetched before the version was known."""

_upcoming: dict[Path, set[str]] = {}
"""Folder of a store in the cache -> paths that this process will need soon; a prefetch does not evict them."""


class LocalFiles:
    """The files of a store in a folder; the same interface as `RemoteFiles`."""

    way_out = "`fastmae verify STORE --repair` makes it again"
    """What to do about a damaged file, for messages."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def location(self) -> str:
        """The store, for messages."""
        return str(self.folder)

    def named(self, error: InputError) -> InputError:
        """The error itself: it names the file."""
        return error

    def pin(self, version: str, sizes: Mapping[str, int]) -> None:
        """Do nothing: a folder holds one version."""

    def path(self, name: str) -> Path:
        """Path of a file of the store, whether or not it exists."""
        return self.folder / name

    def exists(self, name: str) -> bool:
        """Whether the store has this file."""
        return self.path(name).exists()

    def discard(self, name: str) -> bool:
        """False: the file is the original, and nothing can replace it."""
        return False

    def prefetch(self, names: Sequence[str]) -> None:
        """Do nothing: all files are here."""


class RemoteFiles:
    """The files of a store behind a URL, each fetched whole into a cache when it is first needed.

    Before `pin`, each object fetches every file anew, so that a rebuilt store is noticed; shards can be read only
    after it. An object can be used in forked processes and in several threads, and can be pickled. fsspec finds the
    credentials where it always does for that kind of URL, and takes options from its own configuration
    (FSSPEC_S3_ANON=true, say).

    Args:
        url: the store's folder: s3://, gs://, https://, hf://, or any other that fsspec knows.
        cache: folder on this machine, shared by any number of stores; created when missing.
        limit_bytes: most bytes that all files in `cache` may take, at every moment, downloads under way included. The
            shards used least recently are removed to make room; a store's small files are never removed. A file that
            finds no room because of other downloads waits for them.
    """

    way_out = "copy the store there again, or run `fastmae verify` where it lies"
    """What to do about a damaged file, for messages."""

    def __init__(self, url: str, cache: Path, limit_bytes: int):
        self.location = url.rstrip("/")
        self._cache = BoundedFolder(cache, limit_bytes)
        self._home = cache / hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._version: str | None = None
        self._sizes: Mapping[str, int] = {}
        self._fetched: set[str] = set()
        self._last_path: Path | None = None
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def pin(self, version: str, sizes: Mapping[str, int]) -> None:
        """Read all further files as those of one version of the store, including what the cache already holds of it.

        Args:
            version: a digest that changes with any change to the store's files.
            sizes: bytes of each file. A file of another size is refused.
        """
        assert version.isalnum() and version != OPENING
        self._version, self._sizes = version, sizes

    def named(self, error: InputError) -> InputError:
        """An error about a copy in the cache as one about the file behind the URL, with the way out that a URL has."""
        text, copies = re.subn(rf"{re.escape(str(self._home))}/[^/]*", lambda _: self.location, str(error))
        if not copies:
            return error
        cause, _, way_out = text.rpartition("; ")
        skip = ", or give --on-damage skip" if "--on-damage skip" in way_out else ""
        return type(error)(f"{cause or text}; {self.way_out}{skip}")

    def path(self, name: str) -> Path:
        """Path of a complete copy on this machine, fetched when it is not there yet.

        Open it at once, as another process may evict it. A file that is open or mapped stays readable.

        Raises:
            MissingFileError: no such file behind the URL, or no permission.
            InputError: no such host, a transfer that keeps failing, a file of another size, a cache that is too small,
                a missing package.
        """
        target = self._last_path = self._cached_path(name)
        if not self._is_cached(name):
            self._fetch(name)
        return target

    def exists(self, name: str) -> bool:
        """Whether the store has this file, which is then fetched. False when the server forbids it.

        Raises:
            InputError: as `path`.
        """
        try:
            self.path(name)
        except MissingFileError:
            return False
        return True

    def discard(self, name: str) -> bool:
        """Delete a damaged copy, so that `path` fetches it anew. True: there is an original to fetch."""
        self._cached_path(name).unlink(missing_ok=True)
        return True

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch files that will be needed soon, in the background and in this order.

        A new call replaces what the last one still had to fetch. Files that are in the cache already count as used
        now, so what is not needed soon is evicted first. A prefetch waits neither for room nor for another process;
        its errors are raised when `path` is called for the file.
        """
        names = names[:PREFETCH_AT_MOST]
        _upcoming[self._home] = {str(self._cached_path(name)) for name in names}
        # In reverse, so that the file needed first counts as used last.
        missing = [name for name in reversed(names) if not self._is_cached(name)][::-1]
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher(lambda name: self._fetch(name, prefetching=True))
        with contextlib.suppress(Exception):
            # This imports packages and starts an event loop. In a thread, a fork could stop it half-way.
            transfer.file_system(os.getpid(), self.location)
            self._prefetcher.start(missing)

    def _cached_path(self, name: str) -> Path:
        assert self._version is not None or not name.startswith(f"{SHARDS_FOLDER}/"), "which version's shard?"
        return self._home / (self._version or OPENING) / name

    def _is_cached(self, name: str) -> bool:
        """Whether there is a copy to use; it then counts as used now."""
        path = self._cached_path(name)
        cached = name in self._fetched if self._version is None else path.exists()
        if cached:
            with contextlib.suppress(OSError):  # another user's file, or one that was evicted this moment
                # With a time of our own, as the kernel's clock for files ticks only every few milliseconds.
                os.utime(path, ns=(time.time_ns(),) * 2)
        return cached

    def _fetch(self, name: str, prefetching: bool = False) -> None:
        target = self._cached_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(target, wait=not prefetching):
            if self._version is not None and target.exists():  # another process was faster
                return
            # The lock makes us the only writer, so the part's name needs no process number. Nothing is flushed to the
            # disk: after a power cut, checksums find the damage and the file is fetched anew.
            spared = self._spared(prefetching)
            size = self._sizes.get(name)
            with self._cache.part_of(target) as part:
                if size is None:
                    data = transfer.read(self.location, name, MOST_BYTES[name])
                    self._cache.reserve(target, len(data), spared)
                    part.write_bytes(data)
                else:
                    self._cache.reserve(target, size, spared)
                    transfer.download(self.location, name, part, size)
                self._cache.take_in(target)
        self._fetched.add(name)

    def _spared(self, prefetching: bool) -> set[str] | None:
        """Paths that a prefetch must not evict: what this process needs soon, and what it may be about to open."""
        return {str(self._last_path)}.union(*_upcoming.values()) if prefetching else None


StoreFiles = LocalFiles | RemoteFiles


def raise_named(files: StoreFiles, error: InputError) -> NoReturn:
    """Raise an error about a store's file on, with the name by which the user knows the store."""
    named = files.named(error)
    if named is error:
        raise error
    raise named from error


def is_url(text: str) -> bool:
    """Whether a store's location is a URL, not a folder."""
    return "://" in text


def url_of(path: Path) -> str | None:
    """The URL that was given where a path should be; None for a path."""
    if match := re.match(r"(\w+):/(.*)", str(path)):
        slashes = "///" if match[1] == "file" else "//"
        return f"{match[1]}:{slashes}{match[2]}"
    return None


def open_files(location: str | Path, cache: Path, limit_bytes: int) -> StoreFiles:
    """The files of a store in a folder, or behind a URL by way of `cache` (see `RemoteFiles`)."""
    if isinstance(location, str) and is_url(location):
        return RemoteFiles(location, cache, limit_bytes)
    return LocalFiles(Path(location))


class _Prefetcher:
    """Threads that fetch what this process will need soon; they end when nothing is left to fetch.

    Plain daemon threads: those of an executor would hold up the end of the process until their downloads are done.
    """

    def __init__(self, fetch: Callable[[str], None]):
        self.pid = os.getpid()
        self._fetch = fetch
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._threads = 0

    def start(self, names: Sequence[str]) -> None:
        """Fetch these files in this order, instead of those that are still waiting."""
        with self._lock:
            self._waiting = list(names)
            for _ in range(min(PREFETCH_THREADS, len(self._waiting)) - self._threads):
                threading.Thread(target=self._run, daemon=True).start()
                self._threads += 1

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                name = self._waiting.pop(0)
            try:
                self._fetch(name)
            except NoRoomError:
                self.start([])  # what comes later would find no room either
            except Exception:  # raised again when the file is needed
                continue
