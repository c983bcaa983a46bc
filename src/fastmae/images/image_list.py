"""The image list on disk: entries in the order of their keys, a zero byte after each. Ten million take tens of MB to write or read.

Writing sorts outside the memory: sorted runs in files without a name, merged at the end. Reading keeps every 256th
entry's place. The order is that of the keys' bytes alone, so the list is a function of the set of images.
"""

import hashlib
import heapq
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastmae.errors import InputError
from fastmae.images.entries import ENTRY_END, key_bytes
from fastmae.runtime.durable import write_whole

RUN_ENTRIES, RUN_BYTES = 500_000, 64 << 20
"""What is sorted in memory at a time: about 80 MB as Python holds it, and at most 160."""
RUNS = 128
"""Runs that are merged at a time, each with an open file."""
BATCH = 8192
"""Entries that are taken, hashed and written at a time."""
CHUNK = 1 << 18
"""Bytes that are read at a time."""
STRIDE = 256
"""Of how many entries the place of one is kept in memory."""


@dataclass(frozen=True)
class ListInfo:
    """What a list holds.

    Attributes:
        images: how many.
        sha256: over each key and a zero byte, in the list's order: two lists with one digest hold the same images in the same places.
    """

    images: int
    sha256: str


def write_list(entries: Iterable[bytes], file: Path) -> ListInfo:
    """Sort entries and write them as a list, whole or not at all.

    Args:
        entries: in any order; of several with one key, one stays.
        file: the list to appear. Without any entry (the `images` of the answer are 0), nothing happens to it.

    Raises:
        OSError: the disk is full, or fails.
        InputError: as `entries` raises it.
    """
    in_order = _one_a_key(_sorted(entries, file.parent))
    first = list(islice(in_order, 1))
    digest, images = hashlib.sha256(), 0

    def write(aside: Path) -> None:
        nonlocal images
        rest = chain(first, in_order)
        with aside.open("wb") as list_file:
            while batch := list(islice(rest, BATCH)):
                digest.update(_joined(map(key_bytes, batch)))
                list_file.write(_joined(batch))
                images += len(batch)

    if first:
        write_whole(file, write)
    return ListInfo(images, digest.hexdigest())


def new_entries(entries: Iterable[bytes], known: Iterable["ImageList"], folder: Path) -> Iterator[bytes]:
    """Those of `entries` whose key is in none of the lists, in a list's order.

    Args:
        entries: in any order; of several with one key, one stays.
        known: the lists.
        folder: where many entries are sorted, in files without a name.

    Raises:
        OSError, InputError: as `write_list`; also a damaged list.
    """
    taken = map(key_bytes, heapq.merge(*known))
    key_taken = next(taken, None)
    for entry in _one_a_key(_sorted(entries, folder)):
        key = key_bytes(entry)
        while key_taken is not None and key_taken < key:
            key_taken = next(taken, None)
        if key != key_taken:
            yield entry


class ImageList:
    """A list, open for reading. Iterates over its entries; pickles as its file's path and the places that it keeps.

    Args:
        file: that `write_list` wrote.

    Raises:
        InputError: the file is damaged.
        OSError: it can't be read.
    """

    def __init__(self, file: Path):
        self.file = file
        self._starts, self._images, self._bytes = _places(file)
        self._opened: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._images

    def __iter__(self) -> Iterator[bytes]:
        before = b""
        with self.file.open("rb") as list_file:
            for block in _blocks(list_file):
                if not all(map(operator.lt, chain([before], block), block)):
                    raise _damaged(self.file, "its entries are out of order")
                before = block[-1]
                yield from block

    def slice(self, start: int, stop: int) -> list[bytes]:
        """The entries from place `start` up to, not including, `stop`; reads these and at most 510 beside them.

        Raises:
            InputError: the file was changed after it was opened.
        """
        assert 0 <= start <= stop <= len(self)
        first, last = start // STRIDE, -(-stop // STRIDE)
        begin, end = (int(self._starts[place]) if place < len(self._starts) else self._bytes for place in (first, last))
        if self._opened is None:
            self._opened = self.file.open("rb", buffering=0)
        # pread, not seek and read: worker processes that were forked share the place of an open file.
        entries = os.pread(self._opened.fileno(), end - begin, begin).split(ENTRY_END)[:-1]
        if len(entries) != min(last * STRIDE, len(self)) - first * STRIDE:
            raise _damaged(self.file, "it was changed while in use")
        return entries[start - first * STRIDE : stop - first * STRIDE]

    def sha256(self) -> str:
        """The digest of `ListInfo`, from the file as it is now."""
        digest = hashlib.sha256()
        entries = iter(self)
        while batch := list(islice(entries, BATCH)):
            digest.update(_joined(map(key_bytes, batch)))
        return digest.hexdigest()


def _sorted(entries: Iterable[bytes], folder: Path) -> Iterator[bytes]:
    """All entries in order, from memory if they are one run, else by way of files in `folder`."""
    entries = iter(entries)
    runs: list[BinaryIO] = []
    run, more = _sorted_run(entries)
    while more:
        runs.append(_run_file(run, folder))
        if len(runs) == RUNS:
            runs = [_run_file(heapq.merge(*map(_entries_in, runs)), folder)]
        run = []  # two of them need not be in memory
        run, more = _sorted_run(entries)
    return heapq.merge(*map(_entries_in, runs), run) if runs else iter(run)


def _one_a_key(in_order: Iterable[bytes]) -> Iterator[bytes]:
    before = None
    for entry in in_order:
        key = key_bytes(entry)
        if key != before:
            yield entry
        before = key


def _sorted_run(entries: Iterator[bytes]) -> tuple[list[bytes], bool]:
    """As many entries as are sorted at a time, and whether there may be more."""
    run: list[bytes] = []
    size = 0
    while (
        len(run) < RUN_ENTRIES
        and size < RUN_BYTES
        and (batch := list(islice(entries, min(BATCH, RUN_ENTRIES - len(run)))))
    ):
        run += batch
        size += sum(map(len, batch))
    run.sort()
    return run, bool(batch)


def _run_file(run: Iterable[bytes], folder: Path) -> BinaryIO:
    """A run in a file that has no name, so that it is gone with its handle, however this process ends."""
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as it is read
        entries = iter(run)
        while batch := list(islice(entries, BATCH)):
            file.write(_joined(batch))
        file.seek(0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error  # a failed write() does not know its file
    return file


def _entries_in(file: BinaryIO) -> Iterator[bytes]:
    return chain.from_iterable(_blocks(file))


def _blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """The whole entries of a file in lists, each of about a `CHUNK`."""
    rest = b""
    while chunk := file.read(CHUNK):
        *block, rest = (rest + chunk).split(ENTRY_END)
        if block:
            yield block


def _joined(entries: Iterable[bytes]) -> bytes:
    return ENTRY_END.join([*entries, b""])


def _places(file: Path) -> tuple[np.ndarray, int, int]:
    """Where every `STRIDE`th entry of a list starts, int64; how many entries there are, and how many bytes."""
    starts = [np.zeros(1, np.int64)]
    images = size = 0
    ended = True  # whether the byte before is an entry's end
    with file.open("rb") as list_file:
        while chunk := list_file.read(CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 0)
            if (ended and chunk[0] == 0) or (np.diff(ends) == 1).any():
                raise _damaged(file, "an entry in it is empty")
            # After the end number i of this chunk starts the entry number images + i + 1.
            starts.append(ends[-(images + 1) % STRIDE :: STRIDE] + size + 1)
            images, size, ended = images + len(ends), size + len(chunk), chunk[-1] == 0
    if not images or not ended:
        raise _damaged(file, "it ends in the middle")
    return np.concatenate(starts), images, size


def _damaged(file: Path, how: str) -> InputError:
    return InputError(f"{file}: a damaged image list ({how}); remove it and list the images again")
