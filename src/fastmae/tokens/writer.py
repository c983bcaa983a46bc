"""Building a store shard by shard, so that a killed build can be continued.

A shard's bytes follow from the image list and the settings alone, and a shard is on disk whole or not at all. So a
continued build writes just the missing shards, and the finished store is the same to the byte.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import xxhash
from safetensors.numpy import save

from fastmae.errors import InputError
from fastmae.outside.regular_file import read_bounded
from fastmae.runtime.durable import holds_anything, remove_parts, write_new, write_whole
from fastmae.runtime.progress import counted_through
from fastmae.tokens.codec import Codec, learns, learnt_shapes
from fastmae.tokens.encoded import EncodedImages
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    INDEX_FILE,
    INDEX_SCHEMA,
    LISTS_FOLDER,
    MANIFEST_FILE,
    SHARDS_FOLDER,
    STATISTICS_FILE,
    STORE_FILE,
    Part,
    StoreInfo,
    checksum,
    read_store_info,
    shard_path,
    written_shards,
)
from fastmae.tokens.index import index_rows
from fastmae.tokens.manifest import Manifest, measure, read_header, small_files, store_text
from fastmae.tokens.shard import MappedShard
from fastmae.tokens.shard_file import SplitTensor, as_bytes, write_tensors
from fastmae.tokens.shard_header import ImageRecord, ShardHeader
from fastmae.tokens.statistics import SUMS, added, no_sums, statistics_of
from fastmae.tokens.tensor_file import largest_file

ROW_GROUP = 1 << 16
"""Images in a row group of the index, which is held in memory while it is written."""


@dataclass(frozen=True)
class StoredPixels:
    """The pixels of some images as a shard stores them, in one or more parts.

    Attributes:
        parts: JPEG files, one after the other, uint8 [bytes]; or raw pixels, uint8 [n, K, S, S].
        sizes: bytes of each JPEG, a list for each part; None for raw pixels.
    """

    parts: Sequence[torch.Tensor]
    sizes: Sequence[Sequence[int]] | None


class StoreWriter:
    """Builds a new store, or continues one that was begun with the same settings.

    Args:
        folder: the store, made when missing. Its image lists must be in it already (`begin_folder`).
        info: what the store should hold.

    Raises:
        InputError: the folder holds something else, or a store with other settings, which the message names.
    """

    def __init__(self, folder: Path, info: StoreInfo):
        self.folder, self.info = folder, info
        begin_folder(folder)
        if not (folder / STORE_FILE).exists():
            write_new(folder / STORE_FILE, store_text(info).encode())  # if several processes do, the first one's stays
        begun = read_store_info(folder)
        _refuse_other_settings(folder, begun.differences(info))
        self.info = begun  # the images may lie elsewhere by now; the store's bytes stay as they were begun
        (folder / SHARDS_FOLDER).mkdir(exist_ok=True)

    def extend(self, part: Part) -> None:
        """Add another list of images. The store is unfinished until the shards of that list are written."""
        for name in (MANIFEST_FILE, INDEX_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self.info = replace(self.info, parts=(*self.info.parts, part))
        self._write_info()

    @property
    def finished(self) -> bool:
        """Whether the store is complete."""
        last_files = (STATISTICS_FILE, INDEX_FILE, MANIFEST_FILE)
        return all((self.folder / name).exists() for name in last_files) and not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        written = written_shards(self.folder)
        return [shard for shard in range(self.info.shards) if shard not in written]

    def keep_codebooks(self, codec: Codec) -> None:
        """Store what a codec has learnt. If several processes do this, the first one's codebooks stay."""
        write_new(self.folder / CODEBOOKS_FILE, save(codec.tensors()))

    def write_shard(
        self,
        shard: int,
        tokens: Sequence[EncodedImages],
        pixels: StoredPixels,
        pixel_sums: torch.Tensor,
        images: list[ImageRecord],
        flipped_tokens: Sequence[EncodedImages] = (),
    ) -> None:
        """Write one shard, whole or not at all. The bytes of tokens and pixels are not copied.

        Args:
            shard: the shard's number.
            tokens: encoded tokens of the n images that could be decoded, on the CPU, in one or more parts.
            pixels: the middle images of the same, in one or more parts.
            pixel_sums: float64 [2, K], sum and sum of squares of each channel of the middle images, in [0, 1].
            images: all images of the shard, skipped ones included.
            flipped_tokens: like `tokens`, of the mirrored images, when the store keeps them.
        """
        # The order of the tensors is that of the checksums in the header, so it is part of the shard's bytes.
        tensors, pixel_records = _pixel_tensors(pixels)
        columns = [_token_column("", tensors, tokens), [_digest(record) for record in pixel_records]]
        if flipped_tokens:
            columns.append(_token_column("flipped_", tensors, flipped_tokens))
        record_checksums = np.array(columns, dtype=np.uint64).reshape(len(columns), -1).T
        tensors["record_checksums"] = SplitTensor([np.ascontiguousarray(record_checksums)])
        # The sums are stored, so that finishing the store reads no tokens again.
        token_sums = torch.stack([part.sums.double() for part in tokens]).sum(0)
        tensors["channel_sums"], tensors["pixel_sums"] = (SplitTensor.of([sums]) for sums in (token_sums, pixel_sums))
        header = ShardHeader(shard, {name: tensor.checksum for name, tensor in tensors.items()}, images)
        write_whole(shard_path(self.folder, shard), lambda aside: write_tensors(aside, tensors, header.to_metadata()))

    def finish(self) -> None:
        """Write the statistics, the index and the manifest of a store whose shards are complete."""
        if learns(self.info.codec):
            self._copy_codebooks()
        for folder in (self.folder, self.folder / SHARDS_FOLDER, self.folder / LISTS_FOLDER):
            remove_parts(folder)
        self._write_statistics_and_index()
        self._manifest().write(self.folder)

    def header(self, shard: int) -> ShardHeader:
        """The header of a shard that is written."""
        return self._read_back(shard)[0]

    def _write_info(self) -> None:
        text = store_text(self.info)
        write_whole(self.folder / STORE_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))

    def _copy_codebooks(self) -> None:
        codebooks, copy = self.folder / CODEBOOKS_FILE, self.folder / CODEBOOKS_COPY
        largest = largest_file(learnt_shapes(self.info.codec, self.info.token_dim))
        write_new(copy, read_bounded(codebooks, largest))
        if read_bounded(copy, largest) != read_bounded(codebooks, largest):
            problem = "differs from its copy, so one of them is damaged"
            raise InputError(f"{codebooks}: {problem}; `fastmae verify {self.folder} --repair`")

    def _write_statistics_and_index(self) -> None:
        """Write both in one pass over the shards' headers."""
        sums, decoded = no_sums(self.info), 0

        def write_index(aside: Path) -> None:
            nonlocal sums, decoded
            images: list[ImageRecord] = []
            shards: list[int] = []
            # Opened here, as pyarrow takes no path that is not UTF-8.
            with aside.open("wb") as opened, pq.ParquetWriter(opened, INDEX_SCHEMA) as file:
                shards_in_order = range(self.info.shards)
                for shard in counted_through(shards_in_order, "finish the store", "shards", self.info.shards):
                    header, shard_sums = self._read_back(shard)
                    sums = added(sums, shard_sums)
                    decoded += sum(image.row >= 0 for image in header.images)
                    images += header.images
                    shards += [header.shard] * len(header.images)
                    if len(images) >= ROW_GROUP or shard == self.info.shards - 1:
                        file.write_table(index_rows(images, shards))
                        images, shards = [], []
            if not decoded:
                source, first = self.info.parts[0].source, self.header(0).images[0]
                raise InputError(
                    f"{source}: not one image could be decoded (first: {first.path}: {first.status}); delete "
                    f"{self.folder}, which is empty, before you tokenize others there"
                )

        write_whole(self.folder / INDEX_FILE, write_index)
        statistics = statistics_of(self.info, sums, decoded)
        write_whole(self.folder / STATISTICS_FILE, lambda aside: aside.write_bytes(save(statistics)))

    def _manifest(self) -> Manifest:
        shards = [shard_path(self.folder, shard) for shard in range(self.info.shards)]
        return Manifest(
            self.info,
            {name: measure(self.folder / name) for name in small_files(self.info)},
            [(shard.stat().st_size, checksum(read_header(shard))) for shard in shards],
        )

    def _read_back(self, shard: int) -> tuple[ShardHeader, dict[str, np.ndarray]]:
        """A shard's header and its `SUMS`."""
        path, way_out = shard_path(self.folder, shard), "delete it and run the same `fastmae tokenize` again"
        mapped = MappedShard(path, self.info, shard, None)
        sums = {name: mapped.tensors[name] for name in SUMS}
        if any(checksum(as_bytes(tensor)) != mapped.checksums[name] for name, tensor in sums.items()):
            raise InputError(f"{path}: its sums are damaged; {way_out}")
        return ShardHeader.from_file(path), sums


def begin_folder(folder: Path) -> None:
    """Make the folder of a store and the folder of its image lists.

    Raises:
        InputError: it holds something that is not a store.
    """
    is_foreign = folder.exists() and (not folder.is_dir() or holds_anything(folder))
    # The store's own files are looked for last, as another process may have begun the store just now.
    if is_foreign and not any((folder / name).exists() for name in (STORE_FILE, LISTS_FOLDER)):
        raise InputError(f"{folder}: exists and is not a token store; give a folder that is new or empty")
    (folder / LISTS_FOLDER).mkdir(parents=True, exist_ok=True)


def _refuse_other_settings(folder: Path, differences: list[str]) -> None:
    if differences:
        only_images = all(name.startswith("images:") for name in differences)
        way_out = "give them again, or another folder" + (", or --add to take new images in" if only_images else "")
        raise InputError(f"{folder}: was begun with other settings ({'; '.join(differences)}); {way_out}")


def _pixel_tensors(pixels: StoredPixels) -> tuple[dict[str, SplitTensor], Iterator[np.ndarray]]:
    """The shard's tensors of pixels, and the bytes of each image's pixels."""
    data = SplitTensor.of(pixels.parts)
    if pixels.sizes is None:
        return {"pixels": data}, data.digested_rows()
    offsets = np.cumsum([0, *(size for sizes in pixels.sizes for size in sizes)], dtype=np.int64)
    jpegs = (
        jpeg
        for part, sizes in zip(data.parts, pixels.sizes, strict=True)
        for jpeg in np.split(part, np.cumsum(sizes)[:-1])[: len(sizes)]
    )
    return {"jpeg": data, "jpeg_offsets": SplitTensor([offsets])}, jpegs


def _token_column(prefix: str, tensors: dict[str, SplitTensor], tokens: Sequence[EncodedImages]) -> list[int]:
    """Add the tensors of codes and, with codecs that store them, of means; returns the checksum of each record."""
    codes = SplitTensor.of([part.codes for part in tokens])
    means = SplitTensor.of([part.means for part in tokens])
    tensors[f"{prefix}tokens"] = codes
    if means.shape[1]:
        tensors[f"{prefix}token_means"] = means
    return [_digest(code, mean) for code, mean in zip(codes.digested_rows(), means.rows(), strict=True)]


def _digest(*arrays: np.ndarray) -> int:
    """xxh3-64 of the arrays' bytes, one after the other."""
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(as_bytes(array))
    return digest.intdigest()
