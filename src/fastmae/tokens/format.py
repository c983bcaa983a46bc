"""The token store's format: its files, and what each of them holds. Knows neither torch models nor commands.

store.json              settings that made the store (`StoreInfo`); written first
lists/0.list            the images' keys, sorted, a zero byte after each; lists/1.list: those that `--add` brought, ...
codebooks.safetensors   what the codec has learnt (`codec`), for codecs that learn; without it no token can be read, so
                        there is a copy, codebooks.copy.safetensors
shards/00000.safetensors
    tokens              codes [n, grid, grid, C'] of the codec's dtype; with pq<M> also `token_means`, float16 [n, C]
    flipped_tokens      the same of the mirrored middle images, with flips stored (and `flipped_token_means`)
    jpeg, jpeg_offsets  the middle images as JPEGs, uint8 [bytes], and where each begins and ends, int64 [n + 1]
    pixels              instead, with raw pixels: uint8 [n, K, S, S]
    record_checksums    uint64 [n, 2 or 3], xxh3-64 of each image's tokens, pixels and flipped tokens
    channel_sums, pixel_sums   sums for the store's statistics
    metadata            key `fastmae`: a `ShardHeader` in JSON
statistics.safetensors  over the whole store: `mean` and `std` of each token channel, float32 [C]; `pixel_mean` and
                        `pixel_std` of each channel of the middle images, float32 [K], in [0, 1]
index.parquet           a row for each image
manifest.json           size and checksum of every file (`manifest`); written last: it marks a finished store

A store of several middle sizes is a folder of such stores, one for each size (256/, 352/, ...), and scales.json, which
lists them.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, get_origin

import pyarrow as pa
import safetensors
import xxhash

from fastmae.errors import InputError, first_line
from fastmae.images.value_range import AUTO, bounds_of, range_entry

FORMAT_NAME = "fastmae token store"
FORMAT_VERSION = 2

STORE_FILE = "store.json"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.parquet"
STATISTICS_FILE = "statistics.safetensors"
CODEBOOKS_FILE = "codebooks.safetensors"
CODEBOOKS_COPY = "codebooks.copy.safetensors"
LISTS_FOLDER = "lists"
SHARDS_FOLDER = "shards"
SCALES_FILE = "scales.json"
METADATA_KEY = "fastmae"
"""The only key: safetensors keeps no order among several, and a shard must always be the same bytes."""

TOKENS, PIXELS, FLIPPED = range(3)
"""Columns of a shard's `record_checksums`."""

INDEX_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # the image's key, such as its path in the source folder
        ("label", pa.string()),  # name of the image's folder
        ("shard", pa.int32()),
        ("row", pa.int32()),  # in the shard's tensors; -1 for a skipped image
        ("width", pa.int32()),  # of the upright picture; 0 where unknown
        ("height", pa.int32()),
        ("status", pa.string()),  # 'ok', or why it was skipped
    ]
)


@dataclass(frozen=True)
class Part:
    """Images that came into the store together: by the first `tokenize`, or by one `--add`.

    Attributes:
        images: number of images in the list, skipped ones included.
        images_sha256: digest of the list (`images.image_list`).
        source: absolute path of the folder or file that the list was read from.
        kind: kind of source: 'folder', 'list', 'tar' or 'datasets'.
    """

    images: int
    images_sha256: str
    source: str
    kind: str


@dataclass(frozen=True)
class StoreInfo:
    """The contents of store.json: everything that readers and resumed writers must agree on.

    Attributes:
        teacher: what made the tokens, as `Teacher.describe` returns it.
        token_dim: channels of a token, C.
        middle_size: side of the middle image, in pixels.
        patch_size: side of a patch, in pixels.
        channels: channels of the middle images, K: 3 for RGB.
        resize: how a picture becomes a middle image: 'whole' or 'center-crop'.
        codec: name of the codec: 'fp16', 'pq48', ... (`codec`).
        flips: 'approximate' (a flipped view mirrors its tokens) or 'stored' (the mirrored images' tokens are stored).
        pixels: 'jpeg' or 'raw'.
        jpeg_quality: 1 to 100; 0 when the pixels are raw.
        shard_size: images in a shard, skipped ones included; the last shard of a part may hold fewer.
        parts: the image lists, one after the other.
        value_range: how values of more than 8 bits became 8 bits (`images.value_range`). Not written if it is 'auto'.
    """

    teacher: dict[str, Any]
    token_dim: int
    middle_size: int
    patch_size: int
    channels: int
    resize: str
    codec: str
    flips: str
    pixels: str
    jpeg_quality: int
    shard_size: int
    parts: tuple[Part, ...]
    value_range: str = AUTO

    @property
    def grid(self) -> int:
        """Patches along a side of the middle image."""
        return self.middle_size // self.patch_size

    @property
    def images(self) -> int:
        """Number of images in all lists, skipped ones included."""
        return sum(part.images for part in self.parts)

    @property
    def images_sha256(self) -> str:
        """One digest of all lists; with a single list, the list's own."""
        if len(self.parts) == 1:
            return self.parts[0].images_sha256
        return hashlib.sha256("".join(part.images_sha256 for part in self.parts).encode()).hexdigest()

    @cached_property
    def _first_shards(self) -> list[int]:
        """Number of the first shard of each part, and of a part that would follow."""
        return list(accumulate((-(-part.images // self.shard_size) for part in self.parts), initial=0))

    @property
    def shards(self) -> int:
        """Number of shards of the finished store."""
        return self._first_shards[-1]

    def part_of(self, shard: int) -> tuple[int, range]:
        """The part that a shard belongs to, and the indices of the shard's images in that part's list."""
        part = bisect_right(self._first_shards, shard) - 1
        first = (shard - self._first_shards[part]) * self.shard_size
        return part, range(first, min(first + self.shard_size, self.parts[part].images))

    def to_json(self) -> dict[str, Any]:
        """The contents of store.json."""
        settings = asdict(self)
        del settings["value_range"]
        named = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "grid": self.grid}
        return {**named, **settings, **range_entry(self.value_range)}

    @classmethod
    def from_json(cls, value: Any, path: Path) -> "StoreInfo":
        """Check the contents of a store.json.

        Args:
            value: the parsed JSON.
            path: the file, for messages.

        Raises:
            InputError: another format or version, a field that is missing or of the wrong type, or impossible sizes.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
            raise InputError(f"{path}: not a token store's description; give a folder that `fastmae tokenize` made")
        if value.get("version") != FORMAT_VERSION:
            versions = f"format version {value.get('version')!r}, this fastmae reads {FORMAT_VERSION}"
            raise InputError(f"{path}: {versions}; use the fastmae that made it, or tokenize again")
        settings = _checked_fields(cls, {"value_range": AUTO, **value}, path)
        parts = tuple(Part(**_checked_fields(Part, part, path)) for part in value["parts"])
        for part in parts:
            if not Path(part.source).is_absolute() or ".." in Path(part.source).parts:
                raise InputError(f"{path}: source '{part.source}' is not a whole path{_BY_HAND}")
        info = cls(**{**settings, "parts": parts})
        sizes = [info.middle_size, info.patch_size, info.channels, info.token_dim, info.shard_size]
        if not parts or min(sizes + [part.images for part in parts]) < 1 or info.middle_size % info.patch_size:
            raise InputError(f"{path}: impossible sizes (middle {info.middle_size}, patch {info.patch_size}){_BY_HAND}")
        try:
            bounds_of(info.value_range)
        except InputError as error:
            raise InputError(f"{path}: {error}{_BY_HAND}") from error
        return info

    def differences(self, other: "StoreInfo") -> list[str]:
        """What differs from another description, as 'name: mine, not theirs'; where the images lie does not count."""
        mine, theirs = _flat(self), _flat(other)
        return [f"{name}: {mine[name]}, not {theirs.get(name)}" for name in mine if mine[name] != theirs.get(name)]


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
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return cls.from_metadata(file.metadata(), path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)})") from error

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None, path: Path) -> "ShardHeader":
        """Read back what `to_metadata` returned.

        Args:
            metadata: the safetensors metadata.
            path: the shard, for messages.

        Raises:
            InputError: the file is not a shard of a token store, or not as it was written.
        """
        way_out = "delete it and run tokenize again"
        try:
            text = (metadata or {})[METADATA_KEY]
            value = json.loads(text)
            header = cls(value["shard"], value["checksums"], [ImageRecord(*image) for image in value["images"]])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a shard of a token store; {way_out}") from error
        # The checksum covers the text before it, so nothing has to be written once more to compare.
        body = text.rpartition(_CHECKSUM)[0] + "}"
        as_written = f'{body[:-1]}{_CHECKSUM}"{checksum(body.encode())}"}}'
        if metadata != {METADATA_KEY: as_written} or value.get("version") != FORMAT_VERSION:
            raise InputError(f"{path}: its header is damaged; {way_out}")
        return header


def read_store_info(folder: Path) -> StoreInfo:
    """Read and check store.json.

    Raises:
        InputError: `folder` is no token store, or one that can't be read.
    """
    path = folder / STORE_FILE
    if not path.is_file():
        raise InputError(f"{folder}: not a token store (no {STORE_FILE} in it); make one with `fastmae tokenize`")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read ({error}); tokenize again, or bring back the file") from error
    return StoreInfo.from_json(value, path)


def shard_name(shard: int) -> str:
    """Name of a shard's file within the store."""
    return f"{SHARDS_FOLDER}/{shard:05d}.safetensors"


def shard_path(store: Path, shard: int) -> Path:
    """Path of a shard's file."""
    return store / shard_name(shard)


def list_name(part: int) -> str:
    """Name of a part's image list within the store."""
    return f"{LISTS_FOLDER}/{part}.list"


def checksum(data: bytes | memoryview) -> str:
    """xxh3-64 of the bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def _flat(info: StoreInfo) -> dict[str, Any]:
    flat = asdict(info)
    teacher = flat.pop("teacher")
    flat["images"] = " + ".join(f"{part['images']} (list {part['images_sha256'][:8]})" for part in flat.pop("parts"))
    # A description without a precision is of a teacher in fp32.
    teacher = {"precision": "32-true"} | {name: teacher[name] for name in teacher if name != "weights_file"}
    return {**{f"teacher {name}": value for name, value in teacher.items()}, **flat}


_CHECKSUM = ', "checksum": '
"""Begins the last key of a shard's metadata."""
_BY_HAND = "; the file was changed by hand?"


def _checked_fields(kind: Any, value: Any, path: Path) -> dict[str, Any]:
    """A JSON object's values for the fields of a dataclass, each of the field's type (a list for a tuple)."""
    checked = {}
    for field in fields(kind):
        origin: Any = get_origin(field.type) or field.type
        json_type = list if origin is tuple else origin
        checked[field.name] = value.get(field.name) if isinstance(value, dict) else None
        if type(checked[field.name]) is not json_type:  # not isinstance, which takes a bool for an int
            raise InputError(f"{path}: '{field.name}' is missing or not of type {json_type.__name__}{_BY_HAND}")
    return checked
