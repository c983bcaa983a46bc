"""Shards opened for reading: mapped, not loaded. A process checks each image's record when it first touches it."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from fastmae.errors import InputError, first_line
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.files import StoreFiles, raise_named
from fastmae.tokens.format import FLIPPED, PIXELS, TOKENS, StoreInfo, checksum, shard_name
from fastmae.tokens.manifest import Manifest, read_header
from fastmae.tokens.shard_header import (
    content_problem,
    data_problem,
    longest_header,
    mapped_tensors,
    parse_header,
    parse_metadata,
)

Value = TypeVar("Value")

PREFIXES = {TOKENS: "", FLIPPED: "flipped_"}
NO_MEAN = np.zeros(0, np.float16)
MAPPED_SHARDS = 1 << 14
"""Most shards that a process keeps mapped; Linux allows some 65,000 maps."""
MAP_ATTEMPTS = 3
"""Times that a shard behind a URL is fetched and mapped before it counts as damaged."""


class DamagedError(InputError):
    """One image of a store, or a whole shard, does not have the bytes that were written."""


class MappedShard:
    """A shard, opened for reading. Its header is checked: all of its tensors are there, in the shapes of the store.

    Args:
        file: the shard, on a local disk.
        info: what the store holds.
        number: of the shard.
        listed: bytes that the file must have, and the xxh3-64 of its header, from the manifest; None without one.

    Attributes:
        checksums: xxh3-64 of each tensor's bytes, in hex, by the tensor's name.
        checked: bool [rows, 3]: which records were checked already, by column of `record_checksums`.

    Raises:
        DamagedError: the file is missing, its size, its header or a table in it is not what was written, or it is no
            shard of this store.
    """

    def __init__(self, file: Path, info: StoreInfo, number: int, listed: tuple[int, str] | None):
        self.file = file
        try:
            header = read_header(file, longest_header(info, number))
            size = file.stat().st_size
            if listed is not None and size != listed[0]:
                raise self._damaged(f"has {size} bytes, not {listed[0]}")
            if listed is not None and checksum(header) != listed[1]:
                raise self._damaged("its header is damaged")
            entries, metadata = parse_header(header, file)
            written = parse_metadata(metadata, file)
            problem = data_problem(entries, len(header), size) or content_problem(info, number, entries, written)
            if problem is not None:
                raise self._damaged(problem)
            whole = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()  # keeps no file open
        except DamagedError:
            raise
        except InputError as error:
            raise DamagedError(str(error)) from error
        except (OSError, RuntimeError) as error:  # a copy in the cache can be evicted at any moment
            raise DamagedError(first_line(error)) from error
        self.tensors, self.checksums = mapped_tensors(whole[len(header) :], entries), written.checksums
        for name in sorted({"record_checksums", "jpeg_offsets"} & self.tensors.keys()):
            if checksum(self.tensors[name].tobytes()) != self.checksums[name]:
                raise self._damaged(f"its {name} are damaged")
        if info.pixels == "jpeg" and not _are_offsets(self.tensors["jpeg_offsets"], self.tensors["jpeg"].size):
            raise self._damaged("its jpeg_offsets do not divide its JPEGs")
        self.tokens, self.flipped_tokens = self.tensors["tokens"], self.tensors.get("flipped_tokens")
        self.pixels = self.tensors.get("pixels")
        self.record_checksums = self.tensors["record_checksums"]
        self.checked = np.zeros((len(self.record_checksums), 3), dtype=bool)

    def codes(self, row: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """An image's codes [grid, grid, C'] and its mean token, float16 [C] or [0], still on the disk.

        Args:
            row: the image's row in the shard.
            flipped: read the codes of the mirrored image, in a store that keeps them.

        Raises:
            DamagedError: the record is not what was written.
        """
        column = FLIPPED if flipped else TOKENS
        prefix = PREFIXES[column]
        self._check_row(row)
        codes, means = self.tensors[f"{prefix}tokens"][row], self.tensors.get(f"{prefix}token_means")
        mean = NO_MEAN if means is None else means[row]
        self._check(row, column, codes, mean)
        return codes, mean

    def raw_pixels(self, row: int) -> np.ndarray:
        """An image's pixels, uint8 [K, S, S], still on the disk, in a store of raw pixels.

        Raises:
            DamagedError: the record is not what was written.
        """
        self._check_row(row)
        pixels = self.tensors["pixels"][row]
        self._check(row, PIXELS, pixels)
        return pixels

    def jpeg(self, row: int) -> np.ndarray:
        """An image's JPEG, uint8 [bytes], still on the disk.

        Raises:
            DamagedError: the record is not what was written.
        """
        self._check_row(row)
        start, end = self.tensors["jpeg_offsets"][row : row + 2]
        data = self.tensors["jpeg"][start:end]
        self._check(row, PIXELS, data)
        return data

    def _check_row(self, row: int) -> None:
        if row >= len(self.record_checksums):
            raise self._damaged(f"has no image {row}, which the index names")

    def _check(self, row: int, column: int, *arrays: np.ndarray) -> None:
        if self.checked[row, column]:
            return
        digest = xxhash.xxh3_64()
        for array in arrays:
            digest.update(array.data)
        if digest.intdigest() != self.record_checksums[row, column]:
            content = "pixels" if column == PIXELS else "tokens"
            raise self._damaged(f"the {content} of its image {row} are damaged")
        self.checked[row, column] = True

    def _damaged(self, problem: str) -> DamagedError:
        way_out = "`fastmae verify STORE --repair` rebuilds it, --on-damage skip goes on without"
        return DamagedError(f"{self.file}: {problem}; {way_out}")


class OpenShards:
    """The shards of one store, each fetched (from a URL), mapped and checked when this process first reads from it.

    Args:
        files: where the store's files are.
        info: what the store holds.
        manifest: size and checksum of each shard.

    Attributes:
        most_mapped: shards that a process keeps mapped.
    """

    def __init__(self, files: StoreFiles, info: StoreInfo, manifest: Manifest):
        self.files, self.info, self.manifest = files, info, manifest
        self.most_mapped = MAPPED_SHARDS
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "info": self.info, "manifest": self.manifest, "most_mapped": self.most_mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()  # maps do not travel between processes

    def _forget(self) -> None:
        self._mapped: OrderedDict[int, MappedShard] = OrderedDict()
        self._damaged: dict[int, str] = {}
        self._fetched_again: set[int] = set()

    def read(self, number: int, read: Callable[[MappedShard], Value]) -> Value:
        """What `read` returns for shard `number`. A cached copy that turns out damaged is fetched anew, once.

        Raises:
            DamagedError: the shard, or the record that was read, is not what was written.
        """
        try:
            return self._read(number, read)
        except DamagedError as error:
            raise_named(self.files, error)

    def _read(self, number: int, read: Callable[[MappedShard], Value]) -> Value:
        try:
            return read(self._shard(number))
        except DamagedError:
            tried = number in self._damaged or number in self._fetched_again
            if tried or not self.files.discard(shard_name(number)):
                raise
        self._fetched_again.add(number)
        self._mapped.pop(number, None)
        return read(self._shard(number))

    def _shard(self, number: int) -> MappedShard:
        if number in self._damaged:  # known already: no further attempt for each of the shard's images
            raise DamagedError(self._damaged[number])
        if number not in self._mapped:
            try:
                self._mapped[number] = self._map(number)
            except DamagedError as error:
                self._damaged[number] = str(error)
                raise
            if len(self._mapped) > self.most_mapped:
                self._mapped.popitem(last=False)
        return self._mapped[number]

    def _map(self, number: int) -> MappedShard:
        name = shard_name(number)
        for attempt in range(1, MAP_ATTEMPTS + 1):
            try:
                return MappedShard(self.files.path(name), self.info, number, self.manifest.shards[number])
            except MissingFileError as error:
                raise DamagedError(str(error)) from error
            except DamagedError:  # a cached copy: evicted before it was opened, or damaged
                if attempt == MAP_ATTEMPTS or not self.files.discard(name):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")


def _are_offsets(offsets: np.ndarray, end: int) -> bool:
    """Whether offsets, int64 [n + 1], cut `end` bytes into n pieces, none of them empty."""
    return bool(offsets[0] == 0 and offsets[-1] == end and (np.diff(offsets) > 0).all())
