"""The image list on disk: the entries of all images, sorted by the bytes of their keys, with a zero byte after each.

The list depends only on the set of images, so positions in it are the same on every machine. Writing sorts in bounded
memory; reading keeps the offset of every 256th entry.

The external merge sort is our own because no dependency has one: pyarrow sorts in memory, and took 1.3 GB for ten
million names where this takes 50 MB. The standard library's sqlite3 could do it, but it spills to the system's
temporary folder, which may be too small or memory itself; the files here lie next to the list and have no name, so
they vanish with the process.
"""

import hashlib
import heapq
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastmae.errors import InputError
from fastmae.images.entries import ENTRY_END, LONGEST_ENTRY, key_bytes
from fastmae.outside.regular_file import open_regular
from fastmae.runtime.durable import write_whole

RUN_BYTES = 40 << 20
"""Memory of the entries that are sorted at a time."""
BYTES_OBJECT = 41
"""What a bytes object in a Python list takes besides its content, in bytes."""
MAX_RUNS = 128
"""Sorted runs that are merged at a time, each with an open file."""
CHUNK = 1 << 18
"""Bytes that are read at a time."""
STRIDE = 256
"""The offset of every `STRIDE`th entry is kept in memory."""


@dataclass(frozen=True)
class ListInfo:
    """Length and digest of a list.

    Attributes:
        images: number of images.
        sha256: digest of the keys in the list's order, each followed by a zero byte. Lists with the same digest hold
            the same images at the same positions.
        repeated: number of entries that were left out because another one has the same key.
    """

    images: int
    sha256: str
    repeated: int = field(default=0, compare=False)


def write_list(entries: Iterable[bytes], file: Path) -> ListInfo:
    """Sort entries and write them as a list, whole or not at all.

    Args:
        entries: in any order; of entries with the same key, the last in byte order is kept.
        file: path of the list. Without any entry, the file is neither created nor changed.

    Raises:
        OSError: the disk is full, or fails.
        InputError: raised by `entries`.
    """
    distinct = _Distinct(_sorted(entries, file.parent))
    sorted_entries = iter(distinct)
    digest, images = hashlib.sha256(), 0
    first = next(sorted_entries, None)
    if first is None:
        return ListInfo(images, digest.hexdigest())

    def write(part: Path) -> None:
        nonlocal images
        with part.open("wb") as list_file:
            for entry in chain([first], sorted_entries):
                digest.update(key_bytes(entry) + ENTRY_END)
                list_file.write(entry + ENTRY_END)
                images += 1

    write_whole(file, write)
    return ListInfo(images, digest.hexdigest(), distinct.repeated)


def new_entries(entries: Iterable[bytes], known: Iterable["ImageList"], folder: Path) -> Iterator[bytes]:
    """The entries whose key is in none of the known lists, sorted, those with the same key too.

    Args:
        entries: in any order.
        known: lists of images to leave out.
        folder: place for the temporary files of the sort.

    Raises:
        OSError: the disk is full, or fails.
        InputError: raised by `entries`; also a damaged list.
    """
    known_keys = map(key_bytes, heapq.merge(*known))
    known_key = next(known_keys, None)
    for entry in _sorted(entries, folder):
        key = key_bytes(entry)
        while known_key is not None and known_key < key:
            known_key = next(known_keys, None)
        if key != known_key:
            yield entry


class ImageList:
    """A list, open for reading. Iterating gives its entries. It pickles as its path and the offsets that it keeps.

    Args:
        file: list that `write_list` wrote.

    Raises:
        InputError: the file is damaged.
        OSError: the file can't be read.
    """

    def __init__(self, file: Path):
        self.file = file
        self._offsets, self._length, self._bytes = _index(file)
        self._opened: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        previous = b""
        with open_regular(self.file) as list_file:
            for block in _blocks(list_file):
                if not all(map(operator.lt, chain([previous], block), block)):
                    raise _damaged(self.file, "its entries are out of order")
                previous = block[-1]
                yield from block

    def slice(self, start: int, stop: int) -> list[bytes]:
        """The entries from index `start` up to, not including, `stop`. Reads these and at most 510 around them.

        Raises:
            InputError: the file was changed after it was opened.
        """
        assert 0 <= start <= stop <= len(self)
        first, last = start // STRIDE, -(-stop // STRIDE)
        begin, end = (int(self._offsets[i]) if i < len(self._offsets) else self._bytes for i in (first, last))
        if self._opened is None:
            self._opened = open_regular(self.file, buffering=0)
        # pread instead of seek and read: forked worker processes share the position of an open file.
        entries = os.pread(self._opened.fileno(), end - begin, begin).split(ENTRY_END)[:-1]
        if len(entries) != min(last * STRIDE, len(self)) - first * STRIDE:
            raise _damaged(self.file, "it was changed while in use")
        return entries[start - first * STRIDE : stop - first * STRIDE]

    def sha256(self) -> str:
        """The digest of `ListInfo`, computed from the file as it is now."""
        digest = hashlib.sha256()
        for entry in self:
            digest.update(key_bytes(entry) + ENTRY_END)
        return digest.hexdigest()


def _sorted(entries: Iterable[bytes], folder: Path) -> Iterator[bytes]:
    """All entries in byte order, by an external merge sort whose temporary files lie in `folder`.

    Collects entries in memory; each time they fill `RUN_BYTES`, they are sorted and written to a file as one run. At
    the end the files and what is left in memory are merged. Whenever there are `MAX_RUNS` files, they become one.
    """
    runs: list[BinaryIO] = []
    in_memory: list[bytes] = []
    memory_used = 0
    for entry in entries:
        in_memory.append(entry)
        memory_used += len(entry) + BYTES_OBJECT
        if memory_used >= RUN_BYTES:
            in_memory.sort()
            runs.append(_write_run(in_memory, folder))
            in_memory, memory_used = [], 0
            if len(runs) == MAX_RUNS:
                runs = [_write_run(heapq.merge(*map(_read_run, runs)), folder)]
    in_memory.sort()
    return heapq.merge(*map(_read_run, runs), in_memory)


class _Distinct:
    """Sorted entries, of those with the same key only the last.

    Args:
        sorted_entries: the entries.

    Attributes:
        repeated: number of entries that were left out so far.
    """

    def __init__(self, sorted_entries: Iterable[bytes]):
        self.sorted_entries, self.repeated = sorted_entries, 0

    def __iter__(self) -> Iterator[bytes]:
        held, held_key = None, None
        for entry in self.sorted_entries:
            key = key_bytes(entry)
            if key == held_key:
                self.repeated += 1
            elif held is not None:
                yield held
            held, held_key = entry, key
        if held is not None:
            yield held


def _write_run(run: Iterable[bytes], folder: Path) -> BinaryIO:
    """Write a run to a file without a name, which disappears however this process ends."""
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when the merge has read it
        file.writelines(entry + ENTRY_END for entry in run)
        file.seek(0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error  # a failed write doesn't name its file
    return file


def _read_run(file: BinaryIO) -> Iterator[bytes]:
    return chain.from_iterable(_blocks(file))


def _blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """The entries of a file in lists of about `CHUNK` bytes each."""
    rest = b""
    while chunk := file.read(CHUNK):
        *block, rest = (rest + chunk).split(ENTRY_END)
        if block:
            yield block


def _index(file: Path) -> tuple[np.ndarray, int, int]:
    """Offsets of every `STRIDE`th entry of a list, int64; the number of entries; the size in bytes.

    Raises:
        InputError: the list has an empty entry, or no end.
    """
    offsets = [np.zeros(1, np.int64)]
    length = size = left_over = 0  # left_over: bytes of the entry that a chunk begins in the middle of
    at_entry_start = True
    with open_regular(file) as list_file:
        while chunk := list_file.read(CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 0)
            if (at_entry_start and chunk[0] == 0) or (np.diff(ends) == 1).any():
                raise _damaged(file, "an entry in it is empty")
            if np.diff(ends, prepend=-1 - left_over, append=len(chunk)).max() > LONGEST_ENTRY + 1:
                raise _damaged(file, "an entry in it is too long")
            left_over = len(chunk) - 1 - int(ends[-1]) if len(ends) else left_over + len(chunk)
            # Entry number length + i + 1 starts one byte after ends[i].
            offsets.append(ends[-(length + 1) % STRIDE :: STRIDE] + size + 1)
            length, size, at_entry_start = length + len(ends), size + len(chunk), chunk[-1] == 0
    if not length or not at_entry_start:
        raise _damaged(file, "it ends in the middle")
    return np.concatenate(offsets), length, size


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file}: a damaged image list ({reason}); remove it and list the images again")
