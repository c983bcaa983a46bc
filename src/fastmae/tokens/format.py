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
import re
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
import xxhash
from msgspec import Meta

from fastmae.errors import InputError, first_line
from fastmae.images.value_range import AUTO, bounds_of, range_entry
from fastmae.outside.documents import checked, read_json
from fastmae.tokens.codec import code_layout

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

LARGEST_SIDE = 1 << 14
"""Most pixels along the side of a middle image."""
LARGEST_DESCRIPTION = 4 << 20
"""Most bytes of a store.json: a part takes about 300."""
LARGEST_SCALES = 1 << 16
"""Most bytes of a scales.json."""
MOST_IMAGES = (1 << 31) - 1
"""Images are numbered in int32."""

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


Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(max_length=1 << 13)]
Channels = Annotated[int, Meta(ge=1, le=1024)]
Channel = Annotated[int, Meta(ge=0, lt=1024)]


class TeacherEntry(msgspec.Struct):
    """What a store keeps of its teacher, as `Teacher.describe` returns it."""

    spec: Text
    kind: Literal["vit", "cnn"]
    block: Annotated[int, Meta(ge=0, lt=1 << 10)]
    last: Annotated[int, Meta(ge=1, le=1 << 10)]
    norm: Literal["final", "layer", "none"]
    input_size: Annotated[int, Meta(ge=1, le=LARGEST_SIDE)]
    channels: Annotated[list[Channel], Meta(min_length=3, max_length=3)]
    weights_sha256: Sha256
    weights_file: Text | None
    precision: Literal["32-true", "tf32", "bf16-mixed", "16-mixed"] = "32-true"


@dataclass(frozen=True)
class Part:
    """Images that came into the store together: by the first `tokenize`, or by one `--add`.

    Attributes:
        images: number of images in the list, skipped ones included.
        images_sha256: digest of the list (`images.image_list`).
        source: absolute path of the folder or file that the list was read from.
        kind: kind of source: 'folder', 'list', 'tar' or 'datasets'.
    """

    images: Annotated[int, Meta(ge=1, le=MOST_IMAGES)]
    images_sha256: Sha256
    source: Text
    kind: Annotated[str, Meta(pattern=r"\A(folder|list|tar|datasets)\Z")]


@dataclass(frozen=True)
class StoreInfo:
    """The contents of store.json: everything that readers and resumed writers must agree on.

    Attributes:
        teacher: what made the tokens, a `TeacherEntry`.
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
    token_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    middle_size: Annotated[int, Meta(ge=1, le=LARGEST_SIDE)]
    patch_size: Annotated[int, Meta(ge=1, le=1024)]
    channels: Channels
    resize: Literal["whole", "center-crop"]
    codec: Annotated[str, Meta(max_length=16)]
    flips: Literal["approximate", "stored"]
    pixels: Literal["jpeg", "raw"]
    jpeg_quality: Annotated[int, Meta(ge=0, le=100)]
    shard_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    parts: Annotated[tuple[Part, ...], Meta(min_length=1)]
    value_range: Annotated[str, Meta(max_length=64)] = AUTO

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
            InputError: another format or version, a field that is missing, of the wrong type or out of its range, or
                fields that contradict each other.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
            raise InputError(f"{path}: not a token store's description; give a folder that `fastmae tokenize` made")
        if value.get("version") != FORMAT_VERSION:
            versions = f"format version {value.get('version')!r}, this fastmae reads {FORMAT_VERSION}"
            raise InputError(f"{path}: {versions}; use the fastmae that made it, or tokenize again")
        info = checked(value, cls, name=path, way_out=BY_HAND)
        checked(info.teacher, TeacherEntry, name=f"{path}: teacher", way_out=BY_HAND)
        problem = info._contradiction(value.get("grid"))
        if problem is not None:
            raise InputError(f"{path}: {problem}; {BY_HAND}")
        return info

    def _contradiction(self, grid: Any) -> str | None:
        """What does not go together among values that are each in their range; `grid` is what store.json says."""
        if self.middle_size % self.patch_size or grid != self.grid:
            return f"impossible sizes (middle {self.middle_size}, patch {self.patch_size}, grid {grid!r})"
        if self.images > MOST_IMAGES:
            return f"{self.images} images, more than the {MOST_IMAGES} that can be numbered"
        is_jpeg = self.pixels == "jpeg"
        if is_jpeg != (self.jpeg_quality > 0) or (is_jpeg and self.channels not in (1, 3)):
            return f"{self.pixels} pixels of {self.channels} channels in JPEG quality {self.jpeg_quality}"
        if max(self.teacher["channels"]) >= self.channels:
            return f"the teacher's channels {self.teacher['channels']} of {self.channels}"
        try:
            code_layout(self.codec, self.token_dim)
            bounds_of(self.value_range)
        except InputError as error:
            return first_line(error).split(";")[0]
        sources = (part.source for part in self.parts)
        odd = next((path for path in sources if not Path(path).is_absolute() or ".." in Path(path).parts), None)
        return None if odd is None else f"source {odd!r} is not a whole path"

    def differences(self, other: "StoreInfo") -> list[str]:
        """What differs from another description, as 'name: mine, not theirs'; where the images lie does not count."""
        mine, theirs = _flat(self), _flat(other)
        return [f"{name}: {mine[name]}, not {theirs.get(name)}" for name in mine if mine[name] != theirs.get(name)]


def read_store_info(folder: Path) -> StoreInfo:
    """Read and check store.json.

    Raises:
        InputError: `folder` is no token store, or one that can't be read.
    """
    path = folder / STORE_FILE
    way_out = "`fastmae verify STORE --repair` brings it back"
    try:
        return StoreInfo.from_json(read_json(path, way_out=way_out, limit=LARGEST_DESCRIPTION), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        text = f"{folder}: not a token store (no {STORE_FILE} in it); make one with `fastmae tokenize`"
        raise InputError(text) from error
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); {way_out}") from error


def shard_name(shard: int) -> str:
    """Name of a shard's file within the store."""
    return f"{SHARDS_FOLDER}/{shard:05d}.safetensors"


def shard_path(store: Path, shard: int) -> Path:
    """Path of a shard's file."""
    return store / shard_name(shard)


def written_shards(store: Path) -> set[int]:
    """Numbers of the shards whose files are in a store."""
    names = {file.name for file in (store / SHARDS_FOLDER).glob("*.safetensors")}
    numbers = {int(digits[1]) for name in names if (digits := re.match("([0-9]{5,10})[.]", name))}
    return {number for number in numbers if shard_path(store, number).name in names}


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


BY_HAND = "the file was changed by hand? `fastmae verify STORE --repair` brings it back"
