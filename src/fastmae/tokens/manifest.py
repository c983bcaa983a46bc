"""manifest.json: the files of a finished store, with checksums by which any changed bit in any of them is found.

It lists size and checksum of every small file, and of each shard the size and the checksum of its header. The header
holds a checksum of each tensor; one of these tensors holds a checksum of each image's record. So a reader can check
what it reads without reading the rest. The manifest ends with a checksum of itself.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import Meta

from fastmae.errors import InputError
from fastmae.outside.documents import parse_json
from fastmae.outside.regular_file import open_regular, read_bounded
from fastmae.outside.tensors import LENGTH_BYTES, LONGEST_HEADER
from fastmae.runtime.durable import write_whole
from fastmae.runtime.wording import counted
from fastmae.tokens.codec import learns
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    STATISTICS_FILE,
    STORE_FILE,
    StoreInfo,
    checksum,
    list_name,
    shard_name,
)

LARGEST_MANIFEST = 1 << 28
"""Most bytes of a manifest.json: a shard takes about 35, so this is room for two billion images in shards of 256."""
_REPAIR = "`fastmae verify STORE --repair` brings it back"

_Measure = tuple[Annotated[int, Meta(ge=0, lt=1 << 62)], Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]]


class _Body(msgspec.Struct):
    store: dict[str, Any]
    files: dict[str, _Measure]
    shards: list[_Measure]


class _Document(msgspec.Struct):
    manifest: _Body


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
            text = read_bounded(file, LARGEST_MANIFEST)
        except FileNotFoundError as error:
            way_out = "run the same `fastmae tokenize` again to continue it"
            raise InputError(f"{file.parent}: the store is not finished; {way_out}") from error
        except OSError as error:
            raise InputError(f"{file}: can't be read ({error.strerror}); {_REPAIR}") from error
        body = parse_json(text, _Document, name=f"{file}: damaged", way_out=_REPAIR).manifest
        manifest = cls(StoreInfo.from_json(body.store, file), body.files, body.shards)
        if manifest.text().encode() != text:
            raise InputError(f"{file}: damaged, or changed by hand; {_REPAIR}")
        if set(body.files) != set(small_files(manifest.info)):
            raise InputError(f"{file}: does not list the files of this store; {_REPAIR}")
        if len(body.shards) != manifest.info.shards:
            listed = f"lists {counted(len(body.shards), 'shard')}, its copy of {STORE_FILE} {manifest.info.shards}"
            raise InputError(f"{file}: {listed}; {_REPAIR}")
        return manifest

    def check(self, name: str, file: Path) -> None:
        """Check that a small file is the one that was written.

        Args:
            name: of the file, within the store.
            file: where it is.

        Raises:
            InputError: missing or changed.
        """
        try:
            with open_regular(file) as opened:
                same_size = os.fstat(opened.fileno()).st_size == self.files[name][0]
            is_sound = same_size and measure(file) == self.files[name]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{file}: missing; {_REPAIR}") from error
        if not is_sound:
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
    with open_regular(file) as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def small_files(info: StoreInfo) -> list[str]:
    """Names of the files that a finished store has beside its shards, store.json and the manifest itself."""
    codebooks = [CODEBOOKS_FILE, CODEBOOKS_COPY] if learns(info.codec) else []
    return [STATISTICS_FILE, INDEX_FILE, *(list_name(part) for part in range(len(info.parts))), *codebooks]


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
        cause = f"does not go with {MANIFEST_FILE} ({differences}): changed by hand, or another store's"
        raise InputError(f"{file}: {cause}; {_REPAIR}")


def read_header(file: Path, longest: int = LONGEST_HEADER) -> bytes:
    """Read the header of a safetensors file, with the eight bytes of its length in front.

    Args:
        file: the safetensors file.
        longest: most bytes that its header may have.

    Raises:
        InputError: no such file, one that is too short for its header, or a header that is too long.
    """
    try:
        with open_regular(file) as opened:
            length_bytes = opened.read(LENGTH_BYTES)
            length = int.from_bytes(length_bytes, "little")
            header = opened.read(length) if length <= longest else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{file}: missing; {_REPAIR}") from error
    if len(length_bytes) < LENGTH_BYTES or len(header) != length:
        raise InputError(f"{file}: truncated, or not a shard; {_REPAIR}")
    return length_bytes + header
