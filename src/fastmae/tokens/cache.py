"""The folder on this machine for what is read from URLs: bounded at every moment, whoever fills it.

Any number of processes and stores may share one cache. One lock for the whole cache guards its size: before a download
begins, the shards used least recently make room, and the download takes up its full size at once, as a file with a
hole. So the files of the cache never take more than its limit, those on their way included. Each file has a lock of its
own besides; a download whose lock is free was left behind by a kill, and is deleted. fsspec's own caches of files have
neither a limit of size nor locks between processes, so this one is ours.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import AcquireReturnProxy, FileLock, Timeout

from fastmae.errors import InputError, is_full_disk
from fastmae.runtime.durable import PART_SUFFIX
from fastmae.tokens.format import SHARDS_FOLDER

LOCK_POLL = 0.01
"""Seconds between two attempts at a lock that another process holds."""
ROOM_POLL = 0.05
"""Seconds between two looks whether the downloads under way have left room for one more."""
LOCK_SUFFIX = ".lock"
ROOM_FILE = f".room{LOCK_SUFFIX}"
"""Beside the cache's lock, and like a lock not counted: the cache's limit, and how many bytes of it are free at least.
Only when these are used up are the files counted again."""
SPARE_SHARE = 128
"""When shards are evicted, more of them go, up to this part of the limit: so the next files are taken in at once."""


class NoRoomError(Exception):
    """A prefetch found the cache full of files that are needed sooner."""


def lock_of(target: Path, wait: bool = True) -> AcquireReturnProxy:
    """The lock of a file of the cache, taken: it makes its holder the only one who fetches that file.

    Raises:
        Timeout: another one holds it, and we shall not `wait`.
    """
    return _lock(Path(f"{target}{LOCK_SUFFIX}"), wait)


class _CachedShard(NamedTuple):
    """Sorts by the time of its last use."""

    used_ns: int
    size: int
    path: str


class BoundedFolder:
    """A folder whose files never take more than `limit` bytes together.

    A download is a part beside its target. The part has the file's full size from the moment when its room is reserved,
    so that whoever counts the files counts what is still to come.

    Args:
        folder: the cache.
        limit: bytes.
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
            if isinstance(error, OSError) and is_full_disk(error):  # a failed write() does not know its file
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
            NoRoomError: a prefetch would have to wait, or to evict a spared file; nothing was evicted.
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
                raise NoRoomError
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
