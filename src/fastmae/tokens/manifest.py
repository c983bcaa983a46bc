"""manifest.json: what a finished store consists of, so that any changed bit in any of its files is found.

It holds the size and checksum of every small file, and of each shard its size and the checksum of its header; the header
holds a checksum of each of the shard's tensors, and a tensor of the shard one of each image's record. So a reader knows
that a file is what was written without reading more of it than it needs. The manifest ends with a checksum of itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import xxhash
from safetensors.numpy import load_file

from fastmae.errors import InputError, first_line
from fastmae.runtime.durable import write_whole
from fastmae.tokens.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_FILE,
    STORE_FILE,
    StoreInfo,
    checksum,
    shard_name,
)

HEADER_LENGTH = 8
"""Bytes in front of a safetensors header, with its length."""
LONGEST_HEADER = 100_000_000
"""The limit that safetensors itself sets."""


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        info: as in store.json, a second copy of which this is.
        files: name -> (bytes, xxh3-64) of the files that are read whole.
        shards: of each shard (bytes, xxh3-64 of its header).
    """

    info: StoreInfo
    files: dict[str, tuple[int, str]]
    shards: list[tuple[int, str]]

    @property
    def digest(self) -> str:
        """Of everything in it: two stores with one digest hold the same."""
        return checksum(self._body().encode())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that it lists."""
        small = {name: size for name, (size, _) in self.files.items()}
        return small | {shard_name(number): size for number, (size, _) in enumerate(self.shards)}

    def total_bytes(self) -> int:
        """Of the whole store."""
        return sum(self.sizes().values()) + len(store_text(self.info).encode()) + len(self.text().encode())

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        text = self.text()
        write_whole(folder / MANIFEST_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))

    def text(self) -> str:
        """The file's contents."""
        return f'{{"manifest": {self._body()}, "digest": "{self.digest}"}}\n'

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Read and check it.

        Raises:
            InputError: missing, damaged, or of another format.
        """
        try:
            text = file.read_text(encoding="utf-8")
            value = json.loads(text)["manifest"]
            info = StoreInfo.from_json(value["store"], file)
            manifest = cls(
                info,
                {str(name): (int(size), str(digest)) for name, (size, digest) in value["files"].items()},
                [(int(size), str(digest)) for size, digest in value["shards"]],
            )
            whole = manifest.text() == text
        except FileNotFoundError as error:
            raise InputError(
                f"{file.parent}: the store is not finished; run the same `fastmae tokenize` again to continue it"
            ) from error
        except InputError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{file}: damaged; {_REPAIR}") from error
        if not whole:
            raise InputError(f"{file}: damaged, or changed by hand; {_REPAIR}")
        return manifest

    def check(self, name: str, file: Path) -> None:
        """A small file is the one that was written.

        Raises:
            InputError: missing or changed.
        """
        if name not in self.files:
            raise InputError(f"{file.parent / MANIFEST_FILE}: lists no {name}; {_REPAIR}")
        try:
            found = measure(file)
        except FileNotFoundError as error:
            raise InputError(f"{file}: missing; {_REPAIR}") from error
        if found != self.files[name]:
            raise InputError(f"{file}: damaged, or changed by hand; {_REPAIR}")

    def check_all(self, folder: Path) -> None:
        """Every small file is the one that was written.

        Raises:
            InputError: one is not.
        """
        for name in self.files:
            self.check(name, folder / name)

    def _body(self) -> str:
        value: dict[str, Any] = {
            "format": f"{FORMAT_NAME}'s manifest",
            "version": FORMAT_VERSION,
            "store": self.info.to_json(),
            "files": {name: list(self.files[name]) for name in sorted(self.files)},
            "shards": [list(entry) for entry in self.shards],
        }
        return json.dumps(value)


_REPAIR = "`fastmae verify STORE --repair` brings it back"


def measure(file: Path) -> tuple[int, str]:
    """A file's bytes and their xxh3-64, in bounded memory."""
    digest, size = xxhash.xxh3_64(), 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def load_tensors(file: Path) -> dict[str, np.ndarray]:
    """A small safetensors file.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{file}: missing or damaged ({first_line(error)}); {_REPAIR}") from error


def store_text(info: StoreInfo) -> str:
    """The contents of store.json."""
    return json.dumps(info.to_json(), indent=2) + "\n"  # in ASCII, so that paths of any encoding survive


def check_description(manifest: Manifest, info: StoreInfo, folder: Path) -> None:
    """store.json says what the manifest says.

    Raises:
        InputError: it does not.
    """
    if info != manifest.info:
        differing = info.differences(manifest.info) or ["where the images lay"]
        raise InputError(
            f"{folder / STORE_FILE}: was changed after the store was finished ({'; '.join(differing)}); {_REPAIR}"
        )


def read_header(file: Path) -> bytes:
    """A safetensors file's header with its length in front, as it lies on the disk.

    Raises:
        InputError: no such file, or one that is too short for its header.
    """
    try:
        with file.open("rb") as opened:
            first = opened.read(HEADER_LENGTH)
            length = int.from_bytes(first, "little")
            rest = opened.read(length) if length <= LONGEST_HEADER else b""
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; {_REPAIR}") from error
    if len(first) < HEADER_LENGTH or len(rest) != length:
        raise InputError(f"{file}: truncated, or not a shard; {_REPAIR}")
    return first + rest
