"""manifest.json: the files of a finished store, with checksums by which any changed bit in any of them is found.

It lists size and checksum of every small file, and of each shard the size and the checksum of its header. The header
holds a checksum of each tensor; one of these tensors holds a checksum of each image's record. So a reader can check
what it reads without reading the rest. The manifest ends with a checksum of itself.
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
"""Bytes before a safetensors header, which hold its length."""
LONGEST_HEADER = 100_000_000
"""The limit that safetensors itself sets, in bytes."""
_REPAIR = "`fastmae verify STORE --repair` brings it back"


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        info: a copy of store.json.
        files: (bytes, xxh3-64) of each small file, by its name.
        shards: (bytes, xxh3-64 of the header) of each shard.
    """

    info: StoreInfo
    files: dict[str, tuple[int, str]]
    shards: list[tuple[int, str]]

    @property
    def digest(self) -> str:
        """xxh3-64 of the manifest: two stores with the same digest have the same contents."""
        return checksum(self._body().encode())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that it lists, by the file's name."""
        small = {name: size for name, (size, _) in self.files.items()}
        return small | {shard_name(number): size for number, (size, _) in enumerate(self.shards)}

    def total_bytes(self) -> int:
        """Bytes of the whole store."""
        return sum(self.sizes().values()) + len(store_text(self.info).encode()) + len(self.text().encode())

    def write(self, folder: Path) -> None:
        """Write manifest.json into a store, whole or not at all."""
        text = self.text()
        write_whole(folder / MANIFEST_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))

    def text(self) -> str:
        """The contents of the file."""
        return f'{{"manifest": {self._body()}, "digest": "{self.digest}"}}\n'

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Read and check a manifest.json.

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
            as_written = manifest.text() == text
        except FileNotFoundError as error:
            way_out = "run the same `fastmae tokenize` again to continue it"
            raise InputError(f"{file.parent}: the store is not finished; {way_out}") from error
        except InputError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{file}: damaged; {_REPAIR}") from error
        if not as_written:
            raise InputError(f"{file}: damaged, or changed by hand; {_REPAIR}")
        return manifest

    def check(self, name: str, file: Path) -> None:
        """Check that a small file is the one that was written.

        Args:
            name: of the file, within the store.
            file: where it is.

        Raises:
            InputError: missing or changed.
        """
        if name not in self.files:
            raise InputError(f"{file.parent / MANIFEST_FILE}: lists no {name}; {_REPAIR}")
        try:
            measured = measure(file)
        except FileNotFoundError as error:
            raise InputError(f"{file}: missing; {_REPAIR}") from error
        if measured != self.files[name]:
            raise InputError(f"{file}: damaged, or changed by hand; {_REPAIR}")

    def check_all(self, folder: Path) -> None:
        """Check that every small file of a store is the one that was written.

        Raises:
            InputError: one is missing or changed.
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


def measure(file: Path) -> tuple[int, str]:
    """A file's size in bytes and its xxh3-64, read in bounded memory."""
    digest, size = xxhash.xxh3_64(), 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def load_tensors(file: Path) -> dict[str, np.ndarray]:
    """Read a small safetensors file.

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
    """Check that a store's store.json and its copy in the manifest agree.

    Raises:
        InputError: they differ.
    """
    if info != manifest.info:
        differences = "; ".join(info.differences(manifest.info) or ["where the images lay"])
        file = folder / STORE_FILE
        raise InputError(f"{file}: was changed after the store was finished ({differences}); {_REPAIR}")


def read_header(file: Path) -> bytes:
    """Read the header of a safetensors file, with the eight bytes of its length in front.

    Raises:
        InputError: no such file, or one that is too short for its header.
    """
    try:
        with file.open("rb") as opened:
            length_bytes = opened.read(HEADER_LENGTH)
            length = int.from_bytes(length_bytes, "little")
            header = opened.read(length) if length <= LONGEST_HEADER else b""
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; {_REPAIR}") from error
    if len(length_bytes) < HEADER_LENGTH or len(header) != length:
        raise InputError(f"{file}: truncated, or not a shard; {_REPAIR}")
    return length_bytes + header
