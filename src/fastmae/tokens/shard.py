"""One shard's file, mapped: its tensors as arrays that lie on the disk, each image's record checked when it is first touched."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import xxhash

from fastmae.errors import InputError, first_line
from fastmae.tokens.format import FLIPPED, METADATA_KEY, PIXELS, TOKENS, checksum
from fastmae.tokens.manifest import read_header

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


class DamagedError(InputError):
    """Bytes of a store that are not those that were written: of one image, or of a whole shard."""


class MappedShard:
    """A shard, opened for reading.

    Args:
        file: on a local disk.
        size: bytes that the file must have, from the manifest.
        header_checksum: xxh3-64 of its header, from the manifest.
        checked: bool [rows, 3], filled here: which records were checked already, by column of `record_checksums`; None: none yet.

    Raises:
        DamagedError: the file is missing, or its header or its tables are not those that were written.
    """

    def __init__(self, file: Path, size: int, header_checksum: str, checked: np.ndarray | None = None):
        self.file = file
        try:
            header = read_header(file)
            there = file.stat().st_size
            if there != size:
                raise self._damaged(f"has {there} bytes, not {size}")
            if checksum(header) != header_checksum:
                raise self._damaged("its header is damaged")
            self.tensors = _map(file, size, header)
        except DamagedError:
            raise
        except (InputError, OSError, RuntimeError) as error:  # a cached copy can go at any moment
            raise DamagedError(first_line(error)) from error
        pixels = {"pixels"} if "pixels" in self.tensors else {"jpeg", "jpeg_offsets"}
        if not {"tokens", "record_checksums"} | pixels <= self.tensors.keys():
            raise self._damaged("lacks tensors that a shard has")
        checksums = json.loads(json.loads(header[8:])["__metadata__"][METADATA_KEY])["checksums"]
        for name in {"record_checksums", "jpeg_offsets"} & self.tensors.keys():
            if checksum(self.tensors[name].tobytes()) != checksums[name]:
                raise self._damaged(f"its {name} are damaged")
        self.tokens, self.flipped_tokens = self.tensors["tokens"], self.tensors.get("flipped_tokens")
        self.pixels = self.tensors.get("pixels")
        self.record_checksums = self.tensors["record_checksums"]
        self.checked = checked if checked is not None else np.zeros((len(self.record_checksums), 3), dtype=bool)

    def codes(self, row: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Codes [grid, grid, C'] and mean float16 [C] or [0] of an image, on the disk; of its mirror image where the store keeps that.

        Raises:
            DamagedError: not what was written.
        """
        column = FLIPPED if flipped else TOKENS
        prefix = PREFIXES[column]
        codes, means = self.tensors[f"{prefix}tokens"][row], self.tensors.get(f"{prefix}token_means")
        mean = NO_MEAN if means is None else means[row]
        self._check(row, column, codes, mean)
        return codes, mean

    def raw_pixels(self, row: int) -> np.ndarray:
        """uint8 [K, S, S] of an image, on the disk, in a store of raw pixels.

        Raises:
            DamagedError: not what was written.
        """
        found = self.tensors["pixels"][row]
        self._check(row, PIXELS, found)
        return found

    def jpeg(self, row: int) -> np.ndarray:
        """uint8 [bytes]: an image's JPEG, on the disk.

        Raises:
            DamagedError: not what was written.
        """
        start, end = self.tensors["jpeg_offsets"][row : row + 2]
        found = self.tensors["jpeg"][start:end]
        self._check(row, PIXELS, found)
        return found

    def pixels_checksum(self, row: int) -> int | None:
        """xxh3-64 of an image's JPEG or pixels as they were written; None for row -1, an image that was skipped."""
        return None if row < 0 else int(self.record_checksums[row, PIXELS])

    def damaged_records(self) -> list[int]:
        """Rows whose tokens or pixels are not what was written; every byte is read."""
        found = []
        for row in range(len(self.record_checksums)):
            try:
                self.codes(row)
                if self.flipped_tokens is not None:
                    self.codes(row, flipped=True)
                if self.pixels is not None:
                    self.raw_pixels(row)
                else:
                    self.jpeg(row)
            except DamagedError:
                found.append(row)
        return found

    def _check(self, row: int, column: int, *data: np.ndarray) -> None:
        if self.checked[row, column]:
            return
        digest = xxhash.xxh3_64()
        for part in data:
            digest.update(part.data)
        if digest.intdigest() != self.record_checksums[row, column]:
            what = "pixels" if column == PIXELS else "tokens"
            raise self._damaged(f"the {what} of its image {row} are damaged")
        self.checked[row, column] = True

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self.file}: {what}; `fastmae verify STORE --repair` rebuilds it, --on-damage skip goes on without"
        )


def _map(file: Path, size: int, header: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file whose header is known to be right; the map is private and keeps no file open."""
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
