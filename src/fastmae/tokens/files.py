"""Where a store's files are: in a folder, or behind a URL and read through a cache of whole files on this machine.

Any number of processes and stores may share one cache. Each file is downloaded beside its place under a lock of its
own, so it is fetched once; a download whose lock is free was left behind by a kill, and is deleted. One lock for the
whole cache guards its size: before a download and again when it takes its place, the shards used least recently make
room. fsspec's own caches of files have neither a limit of size nor locks between processes, so this one is ours.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import AcquireReturnProxy, FileLock, Timeout

from fastmae.errors import InputError
from fastmae.runtime.durable import PART_SUFFIX
from fastmae.tokens import transfer
from fastmae.tokens.format import SHARDS_FOLDER
from fastmae.tokens.transfer import MissingFileError

PREFETCH_THREADS = 2
PREFETCH_AT_MOST = 128
"""Files that one call of `prefetch` looks ahead; the rest is left to the next call."""
LOCK_POLL = 0.01
"""Seconds between two attempts at a lock that another process holds."""
LOCK_SUFFIX = ".lock"
ROOM_FILE = f".room{LOCK_SUFFIX}"
"""Beside the cache's lock, and like a lock not counted: the cache's limit, and how many bytes of it are free at least.
Only when these are used up are the files counted again."""
SPARE_SHARE = 128
"""When shards are evicted, more of them go, up to this part of the limit: so the next files are taken in at once."""
OPENING = "opening"
"""Folder, beside those of the store's versions, of the files that were fetched before the version was known."""

_upcoming: dict[Path, set[str]] = {}
"""Folder of a store in the cache -> paths that this process will need soon; a prefetch does not evict them."""


class _NoRoomError(Exception):
    """A prefetch found the cache full of files that are needed sooner."""


class LocalFiles:
    """The files of a store in a folder; the same interface as `RemoteFiles`."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def location(self) -> str:
        """The store, for messages."""
        return str(self.folder)

    def pin(self, version: str, sizes: Mapping[str, int] | None = None) -> None:
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
        limit_bytes: most bytes that all files in `cache` may take. Only downloads under way come on top. The shards
            used least recently are removed to make room; a store's small files are never removed.
    """

    def __init__(self, url: str, cache: Path, limit_bytes: int):
        self.location = url.rstrip("/")
        self._cache = _BoundedFolder(cache, limit_bytes)
        self._home = cache / hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._version: str | None = None
        self._sizes: Mapping[str, int] = {}
        self._fetched: set[str] = set()
        self._last_path: Path | None = None
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def pin(self, version: str, sizes: Mapping[str, int] | None = None) -> None:
        """Read all further files as those of one version of the store, including what the cache already holds of it.

        Args:
            version: a digest that changes with any change to the store's files.
            sizes: bytes of each file, where known. This saves asking the server, and a file of another size is refused.
        """
        assert version.isalnum() and version != OPENING
        self._version, self._sizes = version, sizes or {}

    def path(self, name: str) -> Path:
        """Path of a complete copy on this machine, fetched when it is not there yet.

        Open it at once, as another process may evict it. A file that is open or mapped stays readable.

        Raises:
            MissingFileError: no such file behind the URL, or no permission.
            InputError: no such host, a transfer that keeps failing, a cache that is too small, a missing package.
        """
        target = self._last_path = self._cached_path(name)
        if not self._is_cached(name):
            self._fetch(name)
        return target

    def exists(self, name: str) -> bool:
        """Whether the store has this file. False when the server forbids asking; other errors are those of `path`."""
        if self._is_cached(name):
            return True
        try:
            transfer.file_size(self.location, name)
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
        with _lock(Path(f"{target}{LOCK_SUFFIX}"), wait=not prefetching):
            if self._version is not None and target.exists():  # another process was faster
                return
            size = self._sizes.get(name)
            if size is None:
                size = transfer.file_size(self.location, name)
            self._cache.make_room(target, size or 0, self._spared(prefetching))
            # The lock makes us the only writer, so the name needs no process number; what a kill left is overwritten.
            # Nothing is flushed to the disk: after a power cut, checksums find the damage and the file is fetched anew.
            part = Path(f"{target}{PART_SUFFIX}")
            try:
                transfer.download(self.location, name, part, size)
                self._cache.take_in(part, target, self._spared(prefetching))
            finally:
                part.unlink(missing_ok=True)
        self._fetched.add(name)

    def _spared(self, prefetching: bool) -> set[str] | None:
        """Paths that a prefetch must not evict: what this process needs soon, and what it may be about to open."""
        return {str(self._last_path)}.union(*_upcoming.values()) if prefetching else None


StoreFiles = LocalFiles | RemoteFiles


def is_url(text: str) -> bool:
    """Whether a store's location is a URL, not a folder."""
    return "://" in text


def open_files(location: str | Path, cache: Path, limit_bytes: int) -> StoreFiles:
    """The files of a store in a folder, or behind a URL by way of `cache` (see `RemoteFiles`)."""
    if isinstance(location, str) and is_url(location):
        return RemoteFiles(location, cache, limit_bytes)
    return LocalFiles(Path(location))


class _CachedShard(NamedTuple):
    """Sorts by the time of its last use."""

    used_ns: int
    size: int
    path: str


class _BoundedFolder:
    """The cache: a folder whose complete files never take more than `limit` bytes together, whoever fills it."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._counted = False

    def make_room(self, target: Path, size: int, spared: Collection[str] | None) -> None:
        """Evict shards, those used least recently first, until `target` fits beside all other files, with `size` bytes.

        Args:
            target: the file that is about to be fetched; its lock must be held.
            size: bytes of `target`, or 0 when unknown.
            spared: None for a file that is needed now. For a prefetch, the paths that it must not evict.

        Raises:
            InputError: `target` would not fit into a cache that holds no other shard.
            _NoRoomError: a prefetch would have to evict a spared file; nothing was evicted.
        """
        with _lock(self.folder / LOCK_SUFFIX):
            if not 0 < size <= self._known_room():
                self._note_room(size + self._evict(target, size, spared))

    def take_in(self, part: Path, target: Path, spared: Collection[str] | None) -> None:
        """Make room once more, as others may have used it up meanwhile, and rename a complete download to `target`.

        Raises:
            InputError: as `make_room`, where the size was not known before.
            _NoRoomError: as `make_room`.
        """
        with _lock(self.folder / LOCK_SUFFIX):
            size, room = part.stat().st_size, self._known_room()
            if size > room:
                room = size + self._evict(target, size, spared)
            self._note_room(room - size)
            part.replace(target)

    def _known_room(self) -> int:
        """Bytes that are free for certain; 0 when nothing is known, or a process with another limit has noted them.

        Each process counts once itself, which also deletes what killed downloads have left.
        """
        if not self._counted:
            return 0
        try:
            limit, room = (self.folder / ROOM_FILE).read_text(encoding="ascii").split()
            return int(room) if int(limit) == self.limit else 0
        except (OSError, ValueError):
            return 0

    def _note_room(self, room: int) -> None:
        (self.folder / ROOM_FILE).write_text(f"{self.limit} {room}", encoding="ascii")

    def _evict(self, target: Path, size: int, spared: Collection[str] | None) -> int:
        """Count the files, and evict shards if `target` does not fit; returns the bytes that are free beside it."""
        shards, small_bytes, arriving_bytes = self._contents(target)
        self._counted = True
        if small_bytes + size > self.limit:
            limit, need, small = (f"{count / 1e6:.4g} MB" for count in (self.limit, size, small_bytes))
            raise InputError(
                f"{self.folder}: the cache may hold {limit}, but {target.name} takes {need} beside {small} of small "
                "files; allow it at least the sum, better that of several shards"
            )
        excess = small_bytes + arriving_bytes + sum(shard.size for shard in shards) + size - self.limit
        evictable = [shard for shard in sorted(shards) if shard.path not in (spared or ())]
        if spared is not None and excess > sum(shard.size for shard in evictable):
            raise _NoRoomError
        evicting = excess > 0
        for shard in evictable:
            if not evicting or (excess <= 0 and shard.size - excess > self.limit // SPARE_SHARE):
                break
            Path(shard.path).unlink(missing_ok=True)
            excess -= shard.size
        return -excess

    def _contents(self, target: Path) -> tuple[list[_CachedShard], int, int]:
        """The shards, and the bytes of all other complete files and of all downloads so far; `target` is left out."""
        shards: list[_CachedShard] = []
        small_bytes = arriving_bytes = 0
        # Plain strings, as a Path for each of thousands of files takes longer: 5,000 shards are counted in 12 ms.
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = f"{folder}/{name}"
                if name.endswith(LOCK_SUFFIX) or path.startswith(str(target)):
                    continue
                if name.endswith(PART_SUFFIX):
                    _delete_if_abandoned(Path(path))
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)  # noqa: PTH116
                    if name.endswith(PART_SUFFIX):
                        arriving_bytes += status.st_size
                    elif folder.endswith(f"/{SHARDS_FOLDER}"):
                        shards.append(_CachedShard(status.st_mtime_ns, status.st_size, path))
                    else:
                        small_bytes += status.st_size
        return shards, small_bytes, arriving_bytes


def _delete_if_abandoned(part: Path) -> None:
    with contextlib.suppress(Timeout), _lock(part.with_suffix(LOCK_SUFFIX), wait=False):
        part.unlink(missing_ok=True)


def _lock(lock: Path, wait: bool = True) -> AcquireReturnProxy:
    return FileLock(lock).acquire(timeout=-1 if wait else 0, poll_interval=LOCK_POLL)


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
            except _NoRoomError:
                self.start([])  # what comes later would find no room either
            except Exception:  # raised again when the file is needed
                continue
