"""The token store's format: which files there are, and what each holds. Neither torch models nor commands here.

store.json                 what made the store (`StoreInfo`); written first
shards/00000.safetensors   `tokens` [n, grid, grid, C] float16 or float32; with flips stored also `flipped_tokens`, the same of
                           the mirrored middle images; and the pixels of the middle images:
                           `jpeg` uint8 [bytes] with `jpeg_offsets` int64 [n + 1], or `pixels` uint8 [n, K, S, S];
                           metadata key `fastmae`: JSON of a `ShardHeader`
statistics.safetensors     over the whole store: `mean`, `std` float32 [C] of each token channel; `pixel_mean`, `pixel_std`
                           float32 [K] of each channel of the middle images, in [0, 1]
index.parquet              a row an image; written last, so its presence says that the store is finished

A store of several middle sizes is a folder of such stores, one a size (256/, 352/, ...), beside scales.json, which lists them.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from fastmae.errors import InputError

FORMAT_NAME = "fastmae token store"
FORMAT_VERSION = 1

STORE_FILE = "store.json"
INDEX_FILE = "index.parquet"
STATISTICS_FILE = "statistics.safetensors"
SHARDS_FOLDER = "shards"
SCALES_FILE = "scales.json"
METADATA_KEY = "fastmae"  # one key only: safetensors keeps no order among several, and shards must be the same bytes

INDEX_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the source folder
        ("label", pa.string()),  # name of the folder that held the image
        ("shard", pa.int32()),
        ("row", pa.int32()),  # within the shard; -1 for a skipped image
        ("width", pa.int32()),  # of the picture itself, upright; 0 where unknown
        ("height", pa.int32()),
        ("status", pa.string()),  # 'ok', or why it was skipped
    ]
)


@dataclass(frozen=True)
class StoreInfo:
    """The contents of store.json: everything that a reader or a resumed writer must agree on.

    Attributes:
        teacher: what made the tokens: `spec`, `kind` ('vit' or 'cnn'), `block`, `norm`, `input_size`, `grid`, `weights_sha256`.
        token_dim: channels of a token, C.
        middle_size: side of the middle image, in pixels.
        patch_size: side of a patch, in pixels.
        channels: of the middle images, K: 3 for RGB.
        resize: how a picture becomes a middle image: 'whole' or 'center-crop'.
        codec: 'fp16' or 'fp32'.
        flips: 'approximate' (a flipped view mirrors its tokens) or 'stored' (the mirrored images' own tokens are there).
        pixels: 'jpeg' or 'raw'.
        jpeg_quality: 1 to 100; 0 when the pixels are raw.
        shard_size: images a shard (skipped ones included); the last one may hold fewer.
        images: images in the list, skipped ones included.
        images_sha256: digest of the list (`images.sources.list_digest`).
        source: the folder that the list's paths start from.
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
    images: int
    images_sha256: str
    source: str

    @property
    def grid(self) -> int:
        """Patches along a side of the middle image."""
        return self.middle_size // self.patch_size

    @property
    def shards(self) -> int:
        """How many shards the finished store has."""
        return -(-self.images // self.shard_size)

    def shard_images(self, shard: int) -> range:
        """The places in the image list that belong to a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

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
        types: dict[str, type] = {"int": int, "str": str, "dict[str, Any]": dict}
        for field in fields(cls):
            kind = types[field.type if isinstance(field.type, str) else _name(field.type)]
            if type(value.get(field.name)) is not kind:
                raise InputError(f"{path}: '{field.name}' is missing or not of type {kind.__name__}; the file was changed by hand?")
        info = cls(**{field.name: value[field.name] for field in fields(cls)})
        sizes = (info.middle_size, info.patch_size, info.channels, info.token_dim, info.shard_size, info.images)
        if min(sizes) < 1 or info.middle_size % info.patch_size:
            raise InputError(
                f"{path}: sizes that can't be (middle {info.middle_size}, patch {info.patch_size}); the file was changed by hand?"
            )
        return info

    def differences(self, other: "StoreInfo") -> list[str]:
        """What differs between two descriptions, as 'name: mine, not theirs'; where the images lay does not count."""
        mine, theirs = _flat(self), _flat(other)
        return [f"{name}: {mine.get(name)}, not {theirs.get(name)}" for name in mine if mine.get(name) != theirs.get(name)]


@dataclass(frozen=True)
class ImageRecord:
    """One image of a shard, in the order of the list.

    Attributes:
        path: relative to the source folder.
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
        return {METADATA_KEY: json.dumps(value)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None, path: Path) -> "ShardHeader":
        """Read back what `to_metadata` wrote.

        Raises:
            InputError: the file is not a shard of a token store.
        """
        try:
            value = json.loads((metadata or {})[METADATA_KEY])
            return cls(value["shard"], value["checksums"], [ImageRecord(*image) for image in value["images"]])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a shard of a token store; remove it and run tokenize again") from error


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
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); tokenize again, or bring back the file") from error
    return StoreInfo.from_json(value, path)


def shard_path(store: Path, shard: int) -> Path:
    """Where shard number `shard` lies."""
    return store / SHARDS_FOLDER / f"{shard:05d}.safetensors"


def checksum(data: bytes | memoryview) -> str:
    """xxh3-64 of the bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def _flat(info: StoreInfo) -> dict[str, Any]:
    flat = asdict(info)
    teacher = flat.pop("teacher")
    flat.pop("source")
    return {**{f"teacher {name}": value for name, value in teacher.items() if name != "weights_file"}, **flat}


def _name(annotation: Any) -> str:
    return annotation.__name__ if annotation in (int, str) else "dict[str, Any]"
