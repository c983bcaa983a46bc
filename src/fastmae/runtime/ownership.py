"""A folder that is being written has one owner: the process whose record is the lock file in it.

It works between processes and between machines that share a disk. The lock appears whole or not at all, by a hard link,
which is atomic on NFS too. While it is held, a thread touches it every few seconds. The owner is gone if its process
is, which can be told on the same machine; of another machine's owner, if it has not touched the lock for minutes, by
the file server's clock.

Of several processes that find the lock of an owner that is gone, one takes it over: the one that first makes a file
whose name holds that lock's token (a claim). It makes sure that the lock is still the one it has claimed, and renames
its own record onto it. If it dies meanwhile, its claim can be claimed in the same way.

An owner may have been suspended for so long that another process has taken its place. So it looks at the lock before
each file that it puts in place (`check_owner`), and stops if the lock is not its own any more.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from fastmae.errors import InputError
from fastmae.outside.documents import read_json
from fastmae.runtime.processes import LARGEST_PID, born, is_running

log = logging.getLogger(__name__)

LOCK_PREFIX = ".owner"
"""Begins the name of everything that this module puts into a folder."""
CLAIM_SUFFIX = ".claim"
BEAT = 15.0
"""Seconds between two touches of a lock."""
PATIENCE = 180.0
"""Seconds without a touch after which another machine's owner counts as gone."""
POLL = 1.0
"""Seconds between two looks at the lock of another machine's owner."""
ATTEMPTS = 100
"""Each one fails only if another process has just made or removed a lock."""
LARGEST_RECORD = 1 << 16

Text = Annotated[str, msgspec.Meta(max_length=300)]


class Record(msgspec.Struct, frozen=True):
    """What a lock file says about its owner, in JSON.

    Attributes:
        token: of this one lock.
        host: name of the owner's machine, for people.
        machine: tells machines, and on Linux their reboots and containers, apart; process numbers mean the same
            within one of them.
        pid: number of the process.
        born: when the process began, in the system's own unit; None where that can't be told. Numbers are reused.
        since: when the lock was taken, for people.
        command: what the process does, for people.
    """

    token: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    host: Text
    machine: Text
    pid: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PID)]
    born: int | None
    since: Text
    command: Text

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command})"


class Lock(NamedTuple):
    """A lock file as it was found.

    Attributes:
        token: of the lock.
        record: None if the file can't be read as one.
        touched: time of the last touch in ns, by the file server's clock.
    """

    token: str
    record: Record | None
    touched: int


class Owner:
    """This process as the owner of something; made by `owned` and `owned_place`.

    Args:
        place: what is owned: everything at and below this path.
        lock: path of the lock file. Its folder must exist.
        command: what this process does.

    Raises:
        InputError: another process owns it.
        OSError: the lock can't be written.
    """

    def __init__(self, place: Path, lock: Path, command: str):
        self.place, self.lock, self.shown = place.absolute(), lock, place
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        pid = os.getpid()
        self.record = Record(secrets.token_hex(16), _host(), _machine(), pid, born(pid), since, f"fastmae {command}")
        self._own = lock.with_name(f"{lock.name}.{self.record.token}.{_host()}.{pid}.part")
        self._stopped = threading.Event()
        self._own.write_bytes(msgspec.json.encode(self.record))
        _tokens.add(self.record.token)
        try:
            self._take()
        except BaseException:
            _tokens.discard(self.record.token)
            raise
        finally:
            self._own.unlink(missing_ok=True)
        _held[self.record.token] = self
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Remove the lock, unless another process has taken it over."""
        self._stopped.set()
        _held.pop(self.record.token, None)
        _tokens.discard(self.record.token)
        with contextlib.suppress(OSError):
            if self.record.pid == os.getpid() and self._is_mine():
                self.lock.unlink()

    def check(self) -> None:
        """Make sure that this process is still the owner.

        Raises:
            InputError: it is not.
        """
        found = _read(self.lock)
        if found is None:
            raise InputError(
                f"{self.shown}: the lock of this process, {self.lock}, was removed; it stops without writing any more"
            )
        if found.record is not None and found.token != self.record.token:
            raise InputError(
                f"{self.shown}: {found.record} has taken it over, since this process gave no sign "
                "of life for minutes; it stops without writing any more"
            )

    def _is_mine(self) -> bool:
        found = _read(self.lock)
        return found is not None and found.token == self.record.token

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):  # the file server may be away for a moment
                if not self._is_mine():
                    return  # which `check` will find too
                os.utime(self.lock)  # without a time of our own, so that the file server gives its own

    def _take(self) -> None:
        """Make the lock, or take it over from an owner that is gone."""
        for _ in range(ATTEMPTS):
            place, gone = self.lock, list[tuple[Path, Lock]]()
            while (found := _read(place)) is not None and len(gone) < ATTEMPTS:
                alive = self._is_alive(place, found)
                if alive is None:
                    break
                if alive:
                    raise InputError(self._refusal(found))
                gone.append((place, found))
                place = self.lock.with_name(f"{self.lock.name}.{found.token}{CLAIM_SUFFIX}")
            if found is not None or not self._make(place):
                continue
            if all((now := _read(path)) is not None and now.token == was.token for path, was in gone):
                if gone:
                    self._own.replace(self.lock)
                    self._remove_claims()
                    log.info(f"{self.shown}: {gone[0][1].record or 'its owner'} is gone; this process takes its place")
                return
            place.unlink(missing_ok=True)  # another process has taken over meanwhile
        raise InputError(f"{self.shown}: other processes are starting on it at the same time; start one")

    def _remove_claims(self) -> None:
        """Remove the claims on earlier locks, which are void: whoever makes one anew finds that this lock is there."""
        for path in self.lock.parent.iterdir():
            if path.name.startswith(f"{self.lock.name}.") and path.name.endswith(CLAIM_SUFFIX):
                path.unlink(missing_ok=True)

    def _make(self, place: Path) -> bool:
        """Put this process's record at a place where nothing is; returns whether it lies there now."""
        try:
            os.link(self._own, place)
        except FileExistsError:
            found = _read(place)  # NFS may have lost the answer to a link that was made
            return found is not None and found.token == self.record.token
        except OSError:  # a file system without hard links, or a real failure, which writing meets too
            try:
                with place.open("xb") as file:
                    file.write(msgspec.json.encode(self.record))
            except FileExistsError:
                return False
        return True

    def _is_alive(self, place: Path, found: Lock) -> bool | None:
        """Whether the process that has made a lock, or a claim, is still there; None if the file has changed meanwhile.

        Of another machine's process, its next touch is awaited, or its silence.
        """
        record = found.record
        if record is not None and record.machine == _machine():
            return record.token in _tokens if record.pid == os.getpid() else is_running(record.pid, record.born)
        start, told = time.monotonic(), False
        while True:
            os.utime(self._own)
            silence = self._own.stat().st_mtime - found.touched / 1e9
            if max(silence, time.monotonic() - start) > PATIENCE:
                return False
            if not told:
                told = True
                log.info(f"{self.shown}: was in use by {record or 'another process'}; waiting for a sign of its life")
            time.sleep(POLL)
            now = _read(place)
            if now is None or now.token != found.token:
                return None
            if now.touched != found.touched:
                return True

    def _refusal(self, found: Lock) -> str:
        since = f" since {found.record.since}" if found.record else ""
        return (
            f"{self.shown}: in use by {found.record or 'another process'}{since}; wait for it to end, or stop it; if "
            f"there is no such process, delete {self.lock}"
        )


_held: dict[str, Owner] = {}
"""By token: what this process owns."""
_tokens: set[str] = set()
"""Of the same, and of what threads of this process are about to own."""


@contextlib.contextmanager
def owned(folder: Path, command: str, share: str = "") -> Iterator[None]:
    """Own a folder that is written into. It is made if it is missing, and removed again if nothing was written.

    Args:
        folder: of a run or a store. The lock lies in it, so it is the same one under all names of the folder.
        command: what owns it, for people: 'pretrain'.
        share: the part of the work that this process does, if processes with other shares may work at the same time.

    Raises:
        InputError: another process owns it.
        OSError: it can't be written.
    """
    name = f"{LOCK_PREFIX}.{share}.lock" if share else f"{LOCK_PREFIX}.lock"
    with _held_lock(folder, folder, name, command):
        yield


@contextlib.contextmanager
def owned_place(path: Path, command: str) -> Iterator[None]:
    """Own a file or a folder that is made aside and renamed to its place. The lock lies beside it.

    Raises:
        InputError: another process owns it.
        OSError: it can't be written.
    """
    with _held_lock(path, path.absolute().parent, f"{LOCK_PREFIX}.{path.name}.lock", command):
        yield


def check_owner(path: Path) -> None:
    """Before a file is put in place: make sure that nothing at or above its path was taken over from this process.

    Raises:
        InputError: another process owns it by now.
    """
    if _held:
        absolute = path.absolute()
        for owner in list(_held.values()):
            if absolute.is_relative_to(owner.place):
                owner.check()


def is_lock(name: str) -> bool:
    """Whether a file's name is that of a lock, or of something that a lock needs for a moment."""
    return name.startswith(f"{LOCK_PREFIX}.")


@contextlib.contextmanager
def _held_lock(place: Path, folder: Path, name: str, command: str) -> Iterator[None]:
    if folder.exists() and (not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK)):
        yield  # nothing can be written there: if something is to be, it will be refused
        return
    made = _make_folders(folder)
    try:
        owner = Owner(place, folder / name, command)
        try:
            yield
        finally:
            owner.release()
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _read(path: Path) -> Lock | None:
    """A lock file; None if there is none. What can't be read is a lock all the same, of an unknown owner."""
    record = None
    try:
        # NFS asks the server how the file is whenever it is opened, so the time below is fresh.
        with contextlib.suppress(InputError, OSError):
            record = read_json(path, Record, way_out="", limit=LARGEST_RECORD)
        touched = path.lstat().st_mtime_ns
    except FileNotFoundError:
        return None
    return Lock(record.token if record else f"{touched:x}", record, touched)


def _host() -> str:
    return socket.gethostname().replace(".", "-")


@cache
def _machine() -> str:
    """Where process numbers mean the same: one boot of one kernel, and one container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()
