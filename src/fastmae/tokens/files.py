"""Where a store's files are: in a folder, or behind a URL and read through a cache of whole files on this machine.

Every process on the machine may use the same cache at once: a file is fetched by one of them, and together they keep the cache
within its limit. A file's lock says who is alive: what lies half-fetched under a lock that is free was left behind by a kill.
"""

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import fsspec.asyn
import fsspec.core
from filelock import AcquireReturnProxy, FileLock, Timeout

from fastmae.errors import InputError, first_line
from fastmae.runtime.durable import PART_SUFFIX, write_whole
from fastmae.tokens.format import SHARDS_FOLDER

RETRY_AFTER = (0.2, 1.0, 3.0)  # seconds before a failed transfer is tried again; then it is given up
STALLED_AFTER = 60.0  # seconds without a byte after which an HTTP transfer has failed
PREFETCH_THREADS = 2
PREFETCH_AT_MOST = 128  # files looked ahead to; more are left to the next call
LOCK_POLL, ROOM_POLL = 0.01, 0.05  # seconds between looks at what another process holds: a lock, the room that it fills
LOCK_SUFFIX = ".lock"
RESERVED_SUFFIX = ".reserved"  # NAME.reserved is as long as NAME will be, while NAME is on its way; a sparse file
USED_FILE = ".used"  # as long as all files and reservations in the cache together, or longer; sparse, too
OPENING = "opening"  # folder of what was fetched before the version was known
MISSING, FORBIDDEN = (404, 410), (401, 403)  # HTTP's status
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)  # a thread runs its event loop, and threads end at a fork

_COMING: dict[Path, set[str]] = {}  # of each store, what this process will need soon: no prefetch takes its room


class MissingFileError(InputError):
    """A file that is not behind the URL, or not for us: a bucket that can't be listed says 'forbidden' of what it lacks."""


class _NoRoomError(Exception):
    """The cache is full of what is needed, or on its way."""


class LocalFiles:
    """The files of a store in a folder; the same interface as `RemoteFiles`."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def location(self) -> str:
        """The store, for messages."""
        return str(self.folder)

    def pin(self, version: str, sizes: Mapping[str, int] | None = None) -> None:
        """Nothing: a folder has one version."""

    def path(self, name: str) -> Path:
        """Where a file of the store is, or would be."""
        return self.folder / name

    def exists(self, name: str) -> bool:
        """Whether the store has a file."""
        return self.path(name).exists()

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing: all files are here."""


class RemoteFiles:
    """The files of a store behind a URL, fetched whole into a cache when they are asked for.

    Until `pin`, each object fetches a file anew, so that a store that was rebuilt is seen; shards can be asked for only after it.
    May be used in forked processes, pickled and used in several threads. Credentials are taken from where fsspec's file system
    for that kind of URL looks for them, and options from fsspec's own configuration (FSSPEC_S3_ANON=true, say).

    Args:
        url: the store's folder: s3://, gs://, https://, hf://, or any other of fsspec's.
        cache: folder on this machine, for any number of stores; made when missing.
        limit_bytes: of all files in `cache`. The shards that were not asked for the longest give way to new ones.
    """

    def __init__(self, url: str, cache: Path, limit_bytes: int):
        self.location = url.rstrip("/")
        self._cache = _BoundedFolder(cache, limit_bytes)
        self._home = cache / hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._version: str | None = None
        self._sizes: Mapping[str, int] = {}
        self._opened: set[str] = set()
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def pin(self, version: str, sizes: Mapping[str, int] | None = None) -> None:
        """From here on, all files are of this version of the store: what the cache holds of it is taken, nothing else is.

        Args:
            version: a digest that is another one after any change to the store's files.
            sizes: bytes of files, where known: saves asking the server, and shows a store that was rebuilt meanwhile.
        """
        assert version.isalnum() and version != OPENING
        self._version, self._sizes = version, sizes or {}

    def path(self, name: str) -> Path:
        """A complete copy of a file on this machine, fetched when it is not there yet.

        Open it at once: another process may need its room for another file. What is open or mapped stays readable.

        Raises:
            MissingFileError: not behind the URL, or no permission.
            InputError: no such host, a transfer that keeps failing, a cache that is too small, a package that is missing.
        """
        target = self._place(name)
        self._cache.last_asked = target
        if not self._is_held(name):
            self._fetch(name, patient=True)
        return target

    def exists(self, name: str) -> bool:
        """Whether the store has a file, as far as we may know: False when the server forbids asking; other errors as from `path`."""
        if self._is_held(name):
            return True
        try:
            _size(self.location, name)
        except MissingFileError:
            return False
        return True

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch files that will be asked for soon, in the background and in this order; those of the last call are forgotten.

        Those that are here count as used now, so what is not asked for soon gives way first, and what is latest next. A prefetch
        waits neither for room nor for another process; its errors come out when the file is really asked for.
        """
        names = names[:PREFETCH_AT_MOST]
        _COMING[self._home] = {str(self._place(name)) for name in names}
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher(lambda name: self._fetch(name, patient=False))
        with contextlib.suppress(Exception):
            _file_system(
                os.getpid(), self.location
            )  # imports, and starts a loop: not in a thread, which a fork would stop half-way
            self._prefetcher.start([name for name in reversed(names) if not self._is_held(name)][::-1])

    def _place(self, name: str) -> Path:
        assert self._version is not None or not name.startswith(f"{SHARDS_FOLDER}/"), "which version's shard?"
        return self._home / (self._version or OPENING) / name

    def _is_held(self, name: str) -> bool:
        place = self._place(name)
        held = name in self._opened if self._version is None else place.exists()
        if held:
            with contextlib.suppress(OSError):  # another user's file, or one that is gone this moment
                os.utime(
                    place, ns=(time.time_ns(),) * 2
                )  # last used now; the kernel's own now is one for all files of some ms
        return held

    def _fetch(self, name: str, patient: bool) -> None:
        target = self._place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _acquire(target.with_name(target.name + LOCK_SUFFIX), patient):
            if self._version is not None and target.exists():
                return
            size = self._sizes.get(name)
            size = _size(self.location, name) if size is None else size
            with self._cache.room(target, size, patient) as make_room:
                write_whole(target, lambda aside: make_room(_download(self.location, name, aside, size)))
        self._opened.add(name)


StoreFiles = LocalFiles | RemoteFiles


def is_url(text: str) -> bool:
    """Whether a store's location is a URL, not a folder."""
    return "://" in text


def open_files(location: str | Path, cache: Path, limit_bytes: int) -> StoreFiles:
    """The files of a store in a folder, or behind a URL by way of `cache` (see `RemoteFiles`), which a folder leaves alone."""
    if isinstance(location, str) and is_url(location):
        return RemoteFiles(location, cache, limit_bytes)
    return LocalFiles(Path(location))


class _BoundedFolder:
    """The cache: a folder whose files together stay within a limit, whatever number of processes fills it."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.last_asked: Path | None = None  # by this process, which may be about to open it

    @contextlib.contextmanager
    def room(self, target: Path, size: int | None, patient: bool) -> Iterator[Callable[[int], None]]:
        """Keep room for a file of `size` bytes (None for unknown) while it is fetched, under its lock.

        Yields what to call with its size once it is here, before it takes `target`'s place. Waits for files that are on their way
        when they leave no room; when not `patient`, it gives up, and takes no room of what will be needed soon.
        """
        reservation = target.with_name(target.name + RESERVED_SUFFIX)
        if reservation.exists():
            _remove_leftovers(target)
        reservation.touch()

        def reserve(came: int) -> None:
            spared = set() if patient else {str(self.last_asked)}.union(*_COMING.values())
            while not self._reserve(reservation, came, spared):
                if not patient:
                    raise _NoRoomError
                time.sleep(ROOM_POLL)

        try:
            reserve(size or 0)
            yield lambda came: None if came == size else reserve(came)
        finally:
            with _acquire(
                self.folder / LOCK_SUFFIX, patient=True
            ):  # not while somebody counts, who would find neither it nor the file
                reservation.unlink(missing_ok=True)

    def _reserve(self, reservation: Path, size: int, spared: set[str]) -> bool:
        """Make room for `size` bytes; False when files that are on their way, or spared, leave none."""
        note = self.folder / USED_FILE
        with _acquire(self.folder / LOCK_SUFFIX, patient=True):
            used = note.stat().st_size if note.exists() else self.limit + 1
            if used + size > self.limit:
                used = self._evict(reservation, size, spared)
            if used + size > self.limit:
                return False
            note.touch()
            os.truncate(note, used + size)  # one call: a kill leaves the old number or the new one
            os.truncate(reservation, size)
        return True

    def _evict(self, reservation: Path, size: int, spared: set[str]) -> int:
        """Remove the shards that were not used for the longest, until `size` bytes fit, unless in vain; gives the bytes left."""
        kept, arriving, shards = self._contents(reservation)
        if kept + size > self.limit:
            raise InputError(
                f"{self.folder}: the cache may hold {self.limit / 1e6:.4g} MB, but {reservation.stem} takes {size / 1e6:.4g} MB beside "
                f"{kept / 1e6:.4g} MB of small files; allow it at least the sum, better that of several shards"
            )
        used, room = kept + arriving + sum(shard[1] for shard in shards), self.limit - size
        evictable = [shard for shard in sorted(shards) if shard[2] not in spared]
        if used - sum(shard[1] for shard in evictable) > room:
            return used
        for _, bytes_, path in evictable:
            if used <= room and used - bytes_ < room - self.limit // 32:
                break  # a few more than needed where they are small, for counting thousands of files takes long
            Path(path).unlink(missing_ok=True)
            used -= bytes_
        return used

    def _contents(self, own: Path) -> tuple[int, int, list[tuple[int, int, str]]]:
        """Bytes that are never evicted, bytes on their way but for an own reservation, the shards: (last use in ns, bytes, path)."""
        kept, arriving, shards = 0, 0, []
        for folder, _, names in os.walk(self.folder):
            reservations = [name for name in names if name.endswith(RESERVED_SUFFIX) and f"{folder}/{name}" != str(own)]
            arriving += sum(_reserved(Path(folder, name)) for name in reservations)
            # Sizes are taken only now: a file that came to rest meanwhile is counted twice rather than not at all.
            files = {
                name for name in names if not name.endswith((LOCK_SUFFIX, RESERVED_SUFFIX, PART_SUFFIX, USED_FILE))
            }
            for name in files.union(name.removesuffix(RESERVED_SUFFIX) for name in reservations):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path := f"{folder}/{name}")  # noqa: PTH116 - thousands of files, and a Path each takes longer
                    if folder.endswith(f"/{SHARDS_FOLDER}"):
                        shards.append((status.st_mtime_ns, status.st_size, path))
                    else:
                        kept += status.st_size
        return kept, arriving, shards


def _reserved(reservation: Path) -> int:
    target = reservation.with_name(reservation.name.removesuffix(RESERVED_SUFFIX))
    with contextlib.suppress(FileNotFoundError):
        size = reservation.stat().st_size
        try:
            with _acquire(target.with_name(target.name + LOCK_SUFFIX), patient=False):
                _remove_leftovers(target)
        except Timeout:
            return size
    return 0


def _remove_leftovers(target: Path) -> None:
    """Delete what a killed process left of a file that it was fetching; the caller holds the file's lock."""
    for part in target.parent.glob(f"{target.name}.*{PART_SUFFIX}"):
        part.unlink(missing_ok=True)
    target.with_name(target.name + RESERVED_SUFFIX).unlink(missing_ok=True)


def _acquire(lock: Path, patient: bool) -> AcquireReturnProxy:
    return FileLock(lock).acquire(timeout=-1 if patient else 0, poll_interval=LOCK_POLL)


class _Prefetcher:
    """Threads of this process that fetch what will be asked for soon; they end when nothing waits."""

    def __init__(self, fetch: Callable[[str], None]):
        self.pid = os.getpid()
        self._fetch = fetch
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._threads = 0

    def start(self, names: Sequence[str]) -> None:
        """Fetch these, in this order, and nothing else that still waits."""
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
                self.start([])  # nor is there for what comes later
            except Exception:  # it comes out when the file is really asked for
                continue


@cache
def _file_system(pid: int, url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, of this process alone, and its own name for that URL.

    Kept for ever, by a forked child too: closing its parent's connections there would take them from the parent.
    """
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in {"http", "https"}:
            import aiohttp  # noqa: PLC0415 - needed for these alone

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=STALLED_AFTER)
            }
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        what = (
            f"the package {missing}; install it (pip install {missing})" if missing else f"more ({first_line(error)})"
        )
        raise InputError(f"{url}: to read {protocol}:// takes {what}") from error
    except ValueError as error:
        raise InputError(
            f"{url}: {first_line(error)}; give a folder, or a URL of https://, s3://, gs:// or hf://"
        ) from error


def _size(url: str, name: str) -> int | None:
    """Bytes of a remote file; None where the server does not say."""

    def ask() -> int | None:
        files, root = _file_system(os.getpid(), url)
        try:
            return files.info(f"{root}/{name}").get("size")
        except FileNotFoundError as error:
            # fsspec calls any failure over HTTP so; the true one is its cause.
            raise (
                error.__cause__ if url.startswith("http") and isinstance(error.__cause__, Exception) else error
            ) from None

    return _persist(ask, f"{url}/{name}")


def _download(url: str, name: str, aside: Path, size: int | None) -> int:
    """Fetch a remote file of `size` bytes, None for unknown, to `aside`; gives its size."""

    def fetch() -> int:
        files, root = _file_system(os.getpid(), url)
        files.get_file(f"{root}/{name}", str(aside))
        came = aside.stat().st_size
        if size is not None and came != size:
            raise EOFError(f"{came} bytes came instead of {size}")
        return came

    return _persist(fetch, f"{url}/{name}")


def _persist(action: Callable[[], Any], url: str) -> Any:
    """Do what may fail for a moment only, once more after each of `RETRY_AFTER`; then, or when that is in vain, an InputError."""
    for delay in (*RETRY_AFTER, None):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise
            status = getattr(error, "status", None)
            if isinstance(error, FileNotFoundError) or status in MISSING:
                raise MissingFileError(
                    f"{url}: no such file; check the address, and that the whole store was copied there"
                ) from error
            if isinstance(error, PermissionError) or status in FORBIDDEN:
                raise MissingFileError(
                    f"{url}: no permission; give the credentials that {url.partition('://')[0]}:// takes"
                ) from error
            if delay is None:
                tries = f"{first_line(error)}, tried {len(RETRY_AFTER) + 1} times"
                raise InputError(f"{url}: can't be fetched ({tries}); check the address and the network") from error
            time.sleep(delay)
    raise AssertionError
