"""The header of a shard: what its safetensors header and the JSON in its metadata say, checked without its tensors.

The checks cover all that reading a shard relies on: its tensors are those of the store, of the right dtypes and shapes,
they lie one after the other and fill the file, and its images have the rows 0 to n - 1.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from fastmae.errors import InputError
from fastmae.images.entries import LONGEST_ENTRY
from fastmae.outside.documents import parse_json
from fastmae.outside.tensors import LENGTH_BYTES, LONGEST_HEADER
from fastmae.tokens.codec import code_layout, keeps_means
from fastmae.tokens.format import FORMAT_VERSION, METADATA_KEY, StoreInfo, checksum
from fastmae.tokens.manifest import read_header
from fastmae.tokens.shard_file import ALIGNMENT, DTYPE_NAMES

DTYPES = {name: np.dtype(dtype) for dtype, name in DTYPE_NAMES.items()}
"""safetensors' names of the dtypes that a shard holds."""
WAY_OUT = "`fastmae verify STORE --repair` rebuilds it"
_CHECKSUM = ', "checksum": '
"""Begins the last key of a shard's metadata."""
_BYTES_PER_IMAGE = 8 * LONGEST_ENTRY
"""Most bytes of a header for each image: JSON in JSON takes at most seven for one of the key, and a reason is short."""

Count = Annotated[int, Meta(ge=0, lt=1 << 48)]
Row = Annotated[int, Meta(ge=-1, lt=1 << 31)]
Side = Annotated[int, Meta(ge=0, lt=1 << 31)]


class TensorEntry(msgspec.Struct, frozen=True):
    """Where a tensor lies in a safetensors file.

    Attributes:
        dtype: safetensors' name of it.
        shape: of the tensor.
        data_offsets: its first byte and the one behind its last, counted from the header's end.
    """

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class ImageRecord:
    """One image of a shard, in the order of the list.

    Attributes:
        path: the image's key.
        row: row in the shard's tensors, or -1 for a skipped image.
        width: of the upright picture, in pixels; 0 when skipped.
        height: of the upright picture, in pixels; 0 when skipped.
        status: 'ok', or why the image was skipped.
    """

    path: str
    row: int
    width: int
    height: int
    status: str


class Metadata(msgspec.Struct):
    """The JSON in a shard's metadata, typed; `ShardHeader` has the same in a form that is easy to use.

    Attributes:
        version: of the store's format.
        shard: the shard's number.
        checksums: xxh3-64 of each tensor's bytes, in hex, by the tensor's name.
        images: path, row, width, height and status of each image.
    """

    version: int
    shard: int
    checksums: dict[str, str]
    images: list[tuple[str, Row, Side, Side, str]]


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard.

    Attributes:
        shard: the shard's number.
        checksums: xxh3-64 of each tensor's bytes, in hex, by the tensor's name.
        images: all images of the shard, skipped ones included.
    """

    shard: int
    checksums: dict[str, str]
    images: list[ImageRecord]

    def to_metadata(self) -> dict[str, str]:
        """The safetensors metadata; ASCII only, so that file names of any encoding survive."""
        value = {
            "version": FORMAT_VERSION,
            "shard": self.shard,
            "checksums": self.checksums,
            "images": [[i.path, i.row, i.width, i.height, i.status] for i in self.images],
        }
        return {METADATA_KEY: json.dumps({**value, "checksum": checksum(json.dumps(value).encode())})}

    @classmethod
    def from_file(cls, path: Path) -> "ShardHeader":
        """Read the header of a shard on disk.

        Raises:
            InputError: as `from_metadata`, or a damaged file.
        """
        return cls.from_metadata(parse_header(read_header(path), path)[1], path)

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "ShardHeader":
        """Read back what `to_metadata` returned.

        Args:
            metadata: the safetensors metadata.
            path: the shard, for messages.

        Raises:
            InputError: the file is not a shard of a token store, or not as it was written.
        """
        value = parse_metadata(metadata, path)
        text = metadata[METADATA_KEY]
        # The checksum covers the text before it, so nothing has to be written once more to compare.
        body = text.rpartition(_CHECKSUM)[0] + "}"
        as_written = f'{body[:-1]}{_CHECKSUM}"{checksum(body.encode())}"}}'
        if metadata != {METADATA_KEY: as_written} or value.version != FORMAT_VERSION:
            raise InputError(f"{path}: its header is damaged; {WAY_OUT}")
        return cls(value.shard, value.checksums, [ImageRecord(*image) for image in value.images])


def longest_header(info: StoreInfo, shard: int) -> int:
    """Most bytes that the header of a shard may have."""
    return min(LONGEST_HEADER, (1 + len(info.part_of(shard)[1])) * _BYTES_PER_IMAGE)


def parse_header(header: bytes, file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The entries of a safetensors header by the tensors' names, and its metadata.

    Args:
        header: from `read_header`.
        file: for messages.

    Raises:
        InputError: no such header.
    """
    sections = parse_json(header[LENGTH_BYTES:], dict[str, msgspec.Raw], name=file, way_out=WAY_OUT)
    metadata = parse_json(bytes(sections.pop("__metadata__", b"{}")), dict[str, str], name=file, way_out=WAY_OUT)
    entries = {name: parse_json(bytes(raw), TensorEntry, name=file, way_out=WAY_OUT) for name, raw in sections.items()}
    return entries, metadata


def parse_metadata(metadata: Mapping[str, str], file: Path) -> Metadata:
    """The JSON in a shard's metadata. Its checksum is not checked.

    Raises:
        InputError: not the metadata of a shard.
    """
    if METADATA_KEY not in metadata:
        raise InputError(f"{file}: not a shard of a token store; {WAY_OUT}")
    return parse_json(metadata[METADATA_KEY], Metadata, name=file, way_out=WAY_OUT)


def data_problem(entries: Mapping[str, TensorEntry], header_bytes: int, file_bytes: int) -> str | None:
    """Why the tensors of a safetensors file can't be mapped: an unknown dtype, or places that do not fill the file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype, (start, stop) = DTYPES.get(entry.dtype), entry.data_offsets
        if dtype is None:
            return f"its {name!r} has the dtype {entry.dtype!r}"
        if start != end or stop - start != dtype.itemsize * math.prod(entry.shape) or start % dtype.itemsize:
            return f"its {name!r} does not lie where it should"
        end = stop
    return "its tensors do not fill the file" if header_bytes % ALIGNMENT or header_bytes + end != file_bytes else None


def content_problem(info: StoreInfo, shard: int, entries: Mapping[str, TensorEntry], metadata: Metadata) -> str | None:
    """What a shard's header says otherwise than store.json.

    Args:
        info: what the store holds.
        shard: number by which the file is named.
        entries: of the shard's tensors.
        metadata: of the shard.
    """
    if metadata.version != FORMAT_VERSION:
        return f"has format version {metadata.version}, not {FORMAT_VERSION}"
    if metadata.shard != shard:
        return f"holds shard {metadata.shard}: it was renamed"
    images = len(info.part_of(shard)[1])
    rows = [row for _, row, *_ in metadata.images if row >= 0]
    if len(metadata.images) != images or rows != list(range(len(rows))):
        return f"its header does not number the {images} images of this shard"
    jpeg_bytes = math.prod(entries["jpeg"].shape) if "jpeg" in entries else 0
    expected = expected_tensors(info, len(rows), jpeg_bytes)
    if expected.keys() != entries.keys():
        odd = min(expected.keys() ^ entries.keys())
        return f"lacks the {odd} of such a shard" if odd in expected else f"holds {odd!r}, which no such shard has"
    for name, (dtype, shape) in expected.items():
        if (entries[name].dtype, entries[name].shape) != (dtype, shape):
            actual = f"{entries[name].dtype} {list(entries[name].shape)}"
            return f"holds {name} of {actual}, not {dtype} {list(shape)} as store.json says"
    return None if metadata.checksums.keys() == entries.keys() else "its header lacks checksums"


def expected_tensors(info: StoreInfo, rows: int, jpeg_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (safetensors' name) and shape of each tensor of a shard, by its name.

    Args:
        info: what the store holds.
        rows: images of the shard that could be decoded.
        jpeg_bytes: bytes of all its JPEGs.
    """
    code_dim, dtype = code_layout(info.codec, info.token_dim)
    stored_flips = info.flips == "stored"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for prefix in ("", "flipped_") if stored_flips else ("",):
        tensors[f"{prefix}tokens"] = (DTYPE_NAMES[str(dtype)], (rows, info.grid, info.grid, code_dim))
        if keeps_means(info.codec):
            tensors[f"{prefix}token_means"] = ("F16", (rows, info.token_dim))
    if info.pixels == "jpeg":
        tensors |= {"jpeg": ("U8", (jpeg_bytes,)), "jpeg_offsets": ("I64", (rows + 1,))}
    else:
        tensors["pixels"] = ("U8", (rows, info.channels, info.middle_size, info.middle_size))
    return {
        **tensors,
        "record_checksums": ("U64", (rows, 3 if stored_flips else 2)),
        "channel_sums": ("F64", (2, info.token_dim)),
        "pixel_sums": ("F64", (2, info.channels)),
    }


def mapped_tensors(data: np.ndarray, entries: Mapping[str, TensorEntry]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file that has passed `data_problem`, without a copy.

    Args:
        data: uint8, all bytes behind the header.
        entries: of the header.
    """
    tensors: dict[str, Any] = {}
    for name, entry in entries.items():
        start, stop = entry.data_offsets
        tensors[name] = data[start:stop].view(DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors
