"""Where a store's files are: in a folder, or behind a URL and read through a cache of whole files on this machine.

Any number of processes and stores may share one cache. Each file is downloaded beside its place under a lock of its
own, so it is fetched once; a download whose lock is free was left behind by a kill, and is deleted. One lock for the
whole cache guards its size: before a download begins, the shards used least recently make room, and the download takes
up its full size at once, as a file with a hole. So the files of the cache never take more than its limit, those on
their way included. fsspec's own caches of files have neither a limit of size nor locks between processes, so this one
is ours.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import AcquireReturnProxy, FileLock, Timeout

from fastmae.errors import InputError
from fastmae.outside.documents import LARGEST_JSON
from fastmae.runtime.durable import PART_SUFFIX
from fastmae.tokens import transfer
from fastmae.tokens.format import SCALES_FILE, SHARDS_FOLDER, STORE_FILE
from fastmae.tokens.transfer import DISK_IS_FULL, MissingFileError

PREFETCH_THREADS = 2
PREFETCH_AT_MOST = 128
"""Files that one call of `prefetch` looks ahead; the rest is left to the next call."""
LOCK_POLL = 0.01
"""Seconds between two attempts at a lock that another process holds."""
ROOM_POLL = 0.05
"""Seconds between two looks whether the downloads under way have left room for one more."""
MOST_BYTES = {SCALES_FILE: 1 << 16, STORE_FILE: 1 << 22}
"""Bytes that a file may have before the manifest tells its size. Others may have `LARGEST_JSON`, the manifest itself
above all: it then lists two million shards."""
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

    way_out = "`fastmae verify STORE --repair` makes it again"
    """What to do about a damaged file, for messages."""

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
        self._cache = _BoundedFolder(cache, limit_bytes)
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
        with _lock(Path(f"{target}{LOCK_SUFFIX}"), wait=not prefetching):
            if self._version is not None and target.exists():  # another process was faster
                return
            # The lock makes us the only writer, so the part's name needs no process number. Nothing is flushed to the
            # disk: after a power cut, checksums find the damage and the file is fetched anew.
            spared = self._spared(prefetching)
            size = self._sizes.get(name)
            with self._cache.part_of(target) as part:
                if size is None:
                    data = transfer.read(self.location, name, MOST_BYTES.get(name, LARGEST_JSON))
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
    """The cache: a folder whose files never take more than `limit` bytes together, whoever fills it.

    A download is a part beside its target. The part has the file's full size from the moment when its room is reserved,
    so that whoever counts the files counts what is still to come.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._counted = False

    @contextlib.contextmanager
    def part_of(self, target: Path) -> Iterator[Path]:
        """The part of a file that is fetched in this context. After an error it goes, and gives its room back.

        The lock of `target` must be held.

        Raises:
            OSError: the disk is full; it names the part.
        """
        part = _part(target)
        try:
            yield part
        except BaseException as error:
            with _lock(self.folder / LOCK_SUFFIX), contextlib.suppress(FileNotFoundError):
                size, room = part.stat().st_size, self._known_room()
                part.unlink()
                if room is not None:
                    self._note_room(room + size)
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:  # a failed write() does not know its file
                raise OSError(error.errno, error.strerror, str(part)) from error
            raise

    def reserve(self, target: Path, size: int, spared: Collection[str] | None) -> None:
        """Evict shards, those used least recently first, until `target` fits, and give its part that room.

        Waits for other downloads that take up the room.

        Args:
            target: the file that is about to be fetched.
            size: its bytes.
            spared: None for a file that is needed now. For a prefetch, the paths that it must not evict.

        Raises:
            InputError: `target` would not fit into a cache that holds no other shard.
            _NoRoomError: a prefetch would have to wait, or to evict a spared file; nothing was evicted.
        """
        part = _part(target)
        while True:
            with _lock(self.folder / LOCK_SUFFIX):
                part.unlink(missing_ok=True)  # left by a kill
                room = self._known_room() or 0
                if size > room:
                    room = self._evict(target, size, spared)
                if size <= room:
                    part.touch()
                    os.truncate(part, size)
                    self._note_room(room - size)
                    return
            time.sleep(ROOM_POLL)

    def take_in(self, target: Path) -> None:
        """Give a complete download its name."""
        with _lock(self.folder / LOCK_SUFFIX):  # whoever counts must not miss it under both names
            _part(target).replace(target)

    def _known_room(self) -> int | None:
        """Bytes that are free for certain; None when nothing is known, or a process with another limit has noted them.

        Each process counts once itself, which also deletes what killed downloads have left.
        """
        if not self._counted:
            return None
        try:
            limit, room = (self.folder / ROOM_FILE).read_text(encoding="ascii").split()
            return int(room) if int(limit) == self.limit else None
        except (OSError, ValueError):
            return None

    def _note_room(self, room: int) -> None:
        (self.folder / ROOM_FILE).write_text(f"{self.limit} {room}", encoding="ascii")

    def _evict(self, target: Path, size: int, spared: Collection[str] | None) -> int:
        """Count the files, and evict shards if `target` does not fit; returns the bytes that are free for it.

        They are too few if only other downloads could make room; then nothing was evicted.
        """
        shards, small_bytes, arriving_bytes = self._contents()
        self._counted = True
        if small_bytes + size > self.limit:
            limit, need, small = (f"{count / 1e6:.4g} MB" for count in (self.limit, size, small_bytes))
            raise InputError(
                f"{self.folder}: the cache may hold {limit}, but {target.name} takes {need} beside {small} of small "
                "files; allow it at least the sum, better that of several shards"
            )
        free = self.limit - small_bytes - arriving_bytes - sum(shard.size for shard in shards)
        evictable = [shard for shard in sorted(shards) if shard.path not in (spared or ())]
        if free + sum(shard.size for shard in evictable) < size:
            if spared is not None:
                raise _NoRoomError
            return free
        evicting = free < size
        for shard in evictable:
            if not evicting or (free >= size and free - size + shard.size > self.limit // SPARE_SHARE):
                break
            Path(shard.path).unlink(missing_ok=True)
            free += shard.size
        return free

    def _contents(self) -> tuple[list[_CachedShard], int, int]:
        """The shards, and the bytes of all other complete files and of all downloads under way."""
        shards: list[_CachedShard] = []
        small_bytes = arriving_bytes = 0
        # Plain strings, as a Path for each of thousands of files takes longer: 5,000 shards are counted in 12 ms.
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = f"{folder}/{name}"
                if name.endswith(LOCK_SUFFIX):
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


def _part(target: Path) -> Path:
    return Path(f"{target}{PART_SUFFIX}")


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
