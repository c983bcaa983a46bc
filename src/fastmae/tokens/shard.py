"""Shards opened for reading: mapped, not loaded. A process checks each image's record when it first touches it."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from fastmae.errors import InputError, first_line
from fastmae.tokens.codec import code_layout, keeps_means
from fastmae.tokens.files import StoreFiles
from fastmae.tokens.format import FLIPPED, METADATA_KEY, PIXELS, TOKENS, StoreInfo, checksum, shard_name
from fastmae.tokens.manifest import Manifest, read_header
from fastmae.tokens.transfer import MissingFileError

Value = TypeVar("Value")

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "U8": np.uint8,
    "I8": np.int8,
    "I64": np.int64,
    "U64": np.uint64,
}
"""safetensors' names of the dtypes that a shard holds."""
PREFIXES = {TOKENS: "", FLIPPED: "flipped_"}
NO_MEAN = np.zeros(0, np.float16)
MAPPED_SHARDS = 1 << 14
"""Most shards that a process keeps mapped; Linux allows some 65,000 maps."""
MAP_ATTEMPTS = 3
"""Times that a shard behind a URL is fetched and mapped before it counts as damaged."""


class DamagedError(InputError):
    """One image of a store, or a whole shard, does not have the bytes that were written."""


class MappedShard:
    """A shard, opened for reading.

    Args:
        file: the shard, on a local disk.
        size: bytes that the file must have, from the manifest.
        header_checksum: xxh3-64 of the file's header, from the manifest.

    Attributes:
        checked: bool [rows, 3]: which records were checked already, by column of `record_checksums`.

    Raises:
        DamagedError: the file is missing, or its size, its header or a table in it is not what was written.
    """

    def __init__(self, file: Path, size: int, header_checksum: str):
        self.file = file
        try:
            header = read_header(file)
            actual_size = file.stat().st_size
            if actual_size != size:
                raise self._damaged(f"has {actual_size} bytes, not {size}")
            if checksum(header) != header_checksum:
                raise self._damaged("its header is damaged")
            self.tensors = _map(file, size, header)
        except DamagedError:
            raise
        except (InputError, OSError, RuntimeError) as error:  # a copy in the cache can be evicted at any moment
            raise DamagedError(first_line(error)) from error
        pixel_tensors = {"pixels"} if "pixels" in self.tensors else {"jpeg", "jpeg_offsets"}
        if not {"tokens", "record_checksums"} | pixel_tensors <= self.tensors.keys():
            raise self._damaged("lacks tensors that a shard has")
        checksums = json.loads(json.loads(header[8:])["__metadata__"][METADATA_KEY])["checksums"]
        for name in {"record_checksums", "jpeg_offsets"} & self.tensors.keys():
            if checksum(self.tensors[name].tobytes()) != checksums[name]:
                raise self._damaged(f"its {name} are damaged")
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
        codes, means = self.tensors[f"{prefix}tokens"][row], self.tensors.get(f"{prefix}token_means")
        mean = NO_MEAN if means is None else means[row]
        self._check(row, column, codes, mean)
        return codes, mean

    def raw_pixels(self, row: int) -> np.ndarray:
        """An image's pixels, uint8 [K, S, S], still on the disk, in a store of raw pixels.

        Raises:
            DamagedError: the record is not what was written.
        """
        pixels = self.tensors["pixels"][row]
        self._check(row, PIXELS, pixels)
        return pixels

    def jpeg(self, row: int) -> np.ndarray:
        """An image's JPEG, uint8 [bytes], still on the disk.

        Raises:
            DamagedError: the record is not what was written.
        """
        start, end = self.tensors["jpeg_offsets"][row : row + 2]
        data = self.tensors["jpeg"][start:end]
        self._check(row, PIXELS, data)
        return data

    def damaged_records(self) -> list[int]:
        """Rows whose tokens or pixels are not what was written. Reads every byte."""
        read_pixels = self.jpeg if self.pixels is None else self.raw_pixels
        damaged = []
        for row in range(len(self.record_checksums)):
            try:
                self.codes(row)
                if self.flipped_tokens is not None:
                    self.codes(row, flipped=True)
                read_pixels(row)
            except DamagedError:
                damaged.append(row)
        return damaged

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
            raise self.files.named(error) from error

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
                shard = MappedShard(self.files.path(name), *self.manifest.shards[number])
                break
            except MissingFileError as error:
                raise DamagedError(str(error)) from error
            except DamagedError:  # a cached copy: evicted before it was opened, or damaged
                if attempt == MAP_ATTEMPTS or not self.files.discard(name):
                    raise
        self._check_shape(shard)
        return shard

    def _check_shape(self, shard: MappedShard) -> None:
        code_dim, dtype = code_layout(self.info.codec, self.info.token_dim)
        shape = (self.info.grid, self.info.grid, code_dim)
        mean_dim = self.info.token_dim if keeps_means(self.info.codec) else 0
        means = shard.tensors.get("token_means", np.zeros((0, 0), np.float16))
        if shard.tokens.shape[1:] != shape or shard.tokens.dtype != dtype or means.shape[1] != mean_dim:
            actual = list(shard.tokens.shape[1:])
            raise DamagedError(f"{shard.file}: holds tokens of {actual}, not {list(shape)} as store.json says")


def _map(file: Path, size: int, header: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file whose header was checked. The map is private and keeps no file open."""
    whole = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    data = whole[len(header) :]
    tensors = {}
    for name, entry in json.loads(header[8:]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            assert end - start == dtype.itemsize * math.prod(entry["shape"])
            tensors[name] = data[start:end].view(dtype).reshape(entry["shape"])
    return tensors
