"""The token store's format: which files there are, and what each holds. Neither torch models nor commands here.

store.json                 what made the store (`StoreInfo`); written first
lists/0.list               keys of the images, sorted, a zero byte after each; lists/1.list: those that `--add` brought, ...
codebooks.safetensors      what a codec has learnt (`codec`), and a copy of it, codebooks.copy.safetensors: without it no token can be
                           read; only with codecs that learn
shards/00000.safetensors   `tokens` [n, grid, grid, C'] as the codec writes them; with flips stored also `flipped_tokens`, the same
                           of the mirrored middle images; the pixels of the middle images: `jpeg` uint8 [bytes] with
                           `jpeg_offsets` int64 [n + 1], or `pixels` uint8 [n, K, S, S]; `record_checksums` uint64 [n, 2 or 3], of
                           each image its tokens', pixels' and flipped tokens' xxh3-64; sums for the statistics; metadata key
                           `fastmae`: JSON of a `ShardHeader`
statistics.safetensors     over the whole store: `mean`, `std` float32 [C] of each token channel; `pixel_mean`, `pixel_std`
                           float32 [K] of each channel of the middle images, in [0, 1]
index.parquet              a row an image
manifest.json              size and checksum of every file (`manifest`); written last, so its presence says that the store is finished

A store of several middle sizes is a folder of such stores, one a size (256/, 352/, ...), beside scales.json, which lists them.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors
import xxhash

from fastmae.errors import InputError, first_line

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
METADATA_KEY = "fastmae"  # one key only: safetensors keeps no order among several, and shards must be the same bytes

TOKENS, PIXELS, FLIPPED = range(3)
"""Columns of a shard's `record_checksums`."""

INDEX_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # the image's key: relative to the source folder, say
        ("label", pa.string()),  # name of the folder that held the image
        ("shard", pa.int32()),
        ("row", pa.int32()),  # within the shard; -1 for a skipped image
        ("width", pa.int32()),  # of the picture itself, upright; 0 where unknown
        ("height", pa.int32()),
        ("status", pa.string()),  # 'ok', or why it was skipped
    ]
)


@dataclass(frozen=True)
class Part:
    """Images that came into the store together: by the first `tokenize`, or by an `--add`.

    Attributes:
        images: in the list, skipped ones included.
        images_sha256: digest of the list (`images.listing`).
        source: absolute path of the folder or file that the list was read from.
        kind: of the source: 'folder', 'list', 'tar' or 'datasets'.
    """

    images: int
    images_sha256: str
    source: str
    kind: str


@dataclass(frozen=True)
class StoreInfo:
    """The contents of store.json: everything that a reader or a resumed writer must agree on.

    Attributes:
        teacher: what made the tokens, as `Teacher.describe` gives it.
        token_dim: channels of a token, C.
        middle_size: side of the middle image, in pixels.
        patch_size: side of a patch, in pixels.
        channels: of the middle images, K: 3 for RGB.
        resize: how a picture becomes a middle image: 'whole' or 'center-crop'.
        codec: how a token lies on disk: 'fp16', 'pq48', ... (`codec`).
        flips: 'approximate' (a flipped view mirrors its tokens) or 'stored' (the mirrored images' own tokens are there).
        pixels: 'jpeg' or 'raw'.
        jpeg_quality: 1 to 100; 0 when the pixels are raw.
        shard_size: images a shard (skipped ones included); a part's last one may hold fewer.
        parts: the image lists, one after the other.
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

    @property
    def grid(self) -> int:
        """Patches along a side of the middle image."""
        return self.middle_size // self.patch_size

    @property
    def images(self) -> int:
        """In all lists, skipped ones included."""
        return sum(part.images for part in self.parts)

    @property
    def images_sha256(self) -> str:
        """One digest of all lists: that of the list itself where there is one."""
        if len(self.parts) == 1:
            return self.parts[0].images_sha256
        return hashlib.sha256("".join(part.images_sha256 for part in self.parts).encode()).hexdigest()

    @cached_property
    def _first_shards(self) -> list[int]:
        """Of each part, and of one that would follow."""
        return list(accumulate((-(-part.images // self.shard_size) for part in self.parts), initial=0))

    @property
    def shards(self) -> int:
        """How many shards the finished store has."""
        return self._first_shards[-1]

    def part_of(self, shard: int) -> tuple[int, range]:
        """Which part a shard belongs to, and which places of that part's list it holds."""
        part = bisect_right(self._first_shards, shard) - 1
        first = (shard - self._first_shards[part]) * self.shard_size
        return part, range(first, min(first + self.shard_size, self.parts[part].images))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return {"format": FORMAT_NAME, "version": FORMAT_VERSION, "grid": self.grid, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, path: Path) -> "StoreInfo":
        """Check and take over the contents of a store.json.

        Raises:
            InputError: another format, another version, or a field that is missing or of the wrong type.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
            raise InputError(f"{path}: not a token store's description; give a folder that `fastmae tokenize` made")
        if value.get("version") != FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {value.get('version')!r}, this fastmae reads {FORMAT_VERSION}; "
                "use the fastmae that made it, or tokenize again"
            )
        _check_types(cls, value, path)
        parts = value["parts"]
        for part in parts:
            _check_types(Part, part, path)
            if not Path(part["source"]).is_absolute() or ".." in Path(part["source"]).parts:
                raise InputError(
                    f"{path}: source '{part['source']}' is not a whole path; the file was changed by hand?"
                )
        made = {
            **{field.name: value[field.name] for field in fields(cls)},
            "parts": tuple(Part(**_own(Part, part)) for part in parts),
        }
        info = cls(**made)
        sizes = (
            info.middle_size,
            info.patch_size,
            info.channels,
            info.token_dim,
            info.shard_size,
            *(part.images for part in info.parts),
        )
        if not parts or min(sizes) < 1 or info.middle_size % info.patch_size:
            raise InputError(
                f"{path}: sizes that can't be (middle {info.middle_size}, patch {info.patch_size}); the file was changed by hand?"
            )
        return info

    def differences(self, other: "StoreInfo") -> list[str]:
        """What differs between two descriptions, as 'name: mine, not theirs'; where the images lay does not count."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{name}: {mine.get(name)}, not {theirs.get(name)}" for name in mine if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class ImageRecord:
    """One image of a shard, in the order of the list.

    Attributes:
        path: its key.
        row: within the shard's tensors, or -1 when skipped.
        width: of the picture, upright, in pixels; 0 when skipped.
        height: the same.
        status: 'ok', or why the image was skipped.
    """

    path: str
    row: int
    width: int
    height: int
    status: str


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard: its number, a checksum a tensor (xxh3-64 of its bytes, hex), and its images."""

    shard: int
    checksums: dict[str, str]
    images: list[ImageRecord]

    def to_metadata(self) -> dict[str, str]:
        """As safetensors metadata; ASCII only, so that file names of any encoding survive."""
        value = {
            "version": FORMAT_VERSION,
            "shard": self.shard,
            "checksums": self.checksums,
            "images": [[i.path, i.row, i.width, i.height, i.status] for i in self.images],
        }
        return {METADATA_KEY: json.dumps({**value, "checksum": checksum(json.dumps(value).encode())})}

    @classmethod
    def from_file(cls, path: Path) -> "ShardHeader":
        """That of a shard on disk.

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
        """Read back what `to_metadata` wrote.

        Raises:
            InputError: the file is not a shard of a token store, or not as it was written.
        """
        try:
            value = json.loads((metadata or {})[METADATA_KEY])
            header = cls(value["shard"], value["checksums"], [ImageRecord(*image) for image in value["images"]])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a shard of a token store; delete it and run tokenize again") from error
        if header.to_metadata() != metadata:
            raise InputError(f"{path}: its header is damaged; delete it and run tokenize again")
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
    """Of shard number `shard`, within the store."""
    return f"{SHARDS_FOLDER}/{shard:05d}.safetensors"


def shard_path(store: Path, shard: int) -> Path:
    """Where shard number `shard` lies."""
    return store / shard_name(shard)


def list_name(part: int) -> str:
    """Of a part's image list, within the store."""
    return f"{LISTS_FOLDER}/{part}.list"


def checksum(data: bytes | memoryview) -> str:
    """xxh3-64 of the bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def _flat(info: StoreInfo) -> dict[str, Any]:
    flat = asdict(info)
    teacher = flat.pop("teacher")
    flat["images"] = " + ".join(f"{part['images']} (list {part['images_sha256'][:8]})" for part in flat.pop("parts"))
    return {**{f"teacher {name}": value for name, value in teacher.items() if name != "weights_file"}, **flat}


def _check_types(kind: type, value: Any, path: Path) -> None:
    types: dict[str, type] = {"int": int, "str": str, "dict[str, Any]": dict, "tuple[Part, ...]": list}
    for field in fields(kind):
        wanted = types[field.type if isinstance(field.type, str) else _name(field.type)]
        given = value.get(field.name) if isinstance(value, dict) else None
        if type(given) is not wanted:
            raise InputError(
                f"{path}: '{field.name}' is missing or not of type {wanted.__name__}; the file was changed by hand?"
            )


def _own(kind: Any, value: dict[str, Any]) -> dict[str, Any]:
    return {field.name: value[field.name] for field in fields(kind)}


def _name(annotation: Any) -> str:
    return (
        annotation.__name__
        if annotation in (int, str)
        else str(annotation).replace("fastmae.tokens.format.", "").replace("typing.", "")
    )
