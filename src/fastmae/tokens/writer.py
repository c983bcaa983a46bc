"""Building a store shard by shard, so that a killed build can be continued.

A shard's bytes follow from the image list and the settings alone, and a shard is on disk whole or not at all. So a
continued build writes just the missing shards, and the finished store is the same to the byte.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
import xxhash
from safetensors.numpy import save

from fastmae.errors import InputError, first_line
from fastmae.images.entries import label_of
from fastmae.runtime.durable import holds_anything, remove_parts, write_new, write_whole
from fastmae.tokens.codec import Codec, learns
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
    ImageRecord,
    Part,
    ShardHeader,
    StoreInfo,
    checksum,
    list_name,
    read_store_info,
    shard_path,
)
from fastmae.tokens.manifest import Manifest, measure, read_header, store_text

ROW_GROUP = 1 << 16
"""Images in a row group of the index, which is held in memory while it is written."""
SUMS = ("channel_sums", "pixel_sums")
"""Tensors of a shard with the sums from which the store's statistics are computed."""


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
        if (folder / STORE_FILE).exists():
            begun = read_store_info(folder)
            _refuse_other_settings(folder, begun.differences(info))
            self.info = begun  # the images may lie elsewhere by now; the store's bytes stay as they were begun
        else:
            self._write_info()
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
        return [shard for shard in range(self.info.shards) if not shard_path(self.folder, shard).exists()]

    def keep_codebooks(self, codec: Codec) -> None:
        """Store what a codec has learnt. If several processes do this, the first one's codebooks stay."""
        write_new(self.folder / CODEBOOKS_FILE, save(codec.tensors()))

    def write_shard(
        self,
        shard: int,
        codec: Codec,
        tokens: torch.Tensor,
        pixels: list[torch.Tensor],
        pixel_sums: torch.Tensor,
        images: list[ImageRecord],
        flipped_tokens: torch.Tensor | None = None,
    ) -> None:
        """Write one shard, whole or not at all.

        Args:
            shard: the shard's number.
            codec: encodes the tokens.
            tokens: float32 [n, grid, grid, C], of the n images that could be decoded.
            pixels: the middle images of the same: a JPEG file each, uint8 [bytes], or raw, uint8 [K, S, S].
            pixel_sums: float64 [2, K], sum and sum of squares of each channel of the middle images, in [0, 1].
            images: all images of the shard, skipped ones included.
            flipped_tokens: like `tokens`, of the mirrored images, when the store keeps them.
        """
        # The order of the tensors is that of the checksums in the header, so it is part of the shard's bytes.
        token_tensors, token_records = _encoded("", codec, tokens)
        tensors = self._pixel_tensors(pixels) | token_tensors
        records = [token_records, [image.numpy().tobytes() for image in pixels]]
        if flipped_tokens is not None:
            flipped_tensors, flipped_records = _encoded("flipped_", codec, flipped_tokens)
            tensors |= flipped_tensors
            records.append(flipped_records)
        digests = [[xxhash.xxh3_64_intdigest(record) for record in column] for column in records]
        tensors["record_checksums"] = np.array(digests, dtype=np.uint64).reshape(len(records), len(pixels)).T
        # The sums are stored, so that finishing the store reads no tokens again.
        flat = tokens.reshape(-1, self.info.token_dim).double()
        tensors["channel_sums"] = torch.stack([flat.sum(0), flat.square().sum(0)]).numpy()
        tensors["pixel_sums"] = pixel_sums.numpy()
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        header = ShardHeader(shard, {name: checksum(tensor.tobytes()) for name, tensor in tensors.items()}, images)
        data = save(tensors, metadata=header.to_metadata())  # not save_file, which has a temporary file of its own
        write_whole(shard_path(self.folder, shard), lambda aside: aside.write_bytes(data))

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
        write_new(copy, codebooks.read_bytes())
        if copy.read_bytes() != codebooks.read_bytes():
            problem = "differs from its copy, so one of them is damaged"
            raise InputError(f"{codebooks}: {problem}; `fastmae verify {self.folder} --repair`")

    def _write_statistics_and_index(self) -> None:
        """Write both in one pass over the shards' headers."""
        token_sums, pixel_sums = np.zeros((2, self.info.token_dim)), np.zeros((2, self.info.channels))
        decoded = 0

        def write_index(aside: Path) -> None:
            nonlocal decoded
            images: list[ImageRecord] = []
            shards: list[int] = []
            # Opened here, as pyarrow takes no path that is not UTF-8.
            with aside.open("wb") as opened, pq.ParquetWriter(opened, INDEX_SCHEMA) as file:
                for shard in range(self.info.shards):
                    header, shard_token_sums, shard_pixel_sums = self._read_back(shard)
                    np.add(token_sums, shard_token_sums, out=token_sums)
                    np.add(pixel_sums, shard_pixel_sums, out=pixel_sums)
                    decoded += sum(image.row >= 0 for image in header.images)
                    images += header.images
                    shards += [header.shard] * len(header.images)
                    if len(images) >= ROW_GROUP or shard == self.info.shards - 1:
                        file.write_table(_index_rows(images, shards))
                        images, shards = [], []
            if not decoded:
                source, first = self.info.parts[0].source, self.header(0).images[0]
                raise InputError(f"{source}: not one image could be decoded (first: {first.path}: {first.status})")

        write_whole(self.folder / INDEX_FILE, write_index)
        statistics = _mean_and_std("", token_sums, decoded * self.info.grid**2)
        statistics |= _mean_and_std("pixel_", pixel_sums, decoded * self.info.middle_size**2)
        write_whole(self.folder / STATISTICS_FILE, lambda aside: aside.write_bytes(save(statistics)))

    def _manifest(self) -> Manifest:
        names = [STATISTICS_FILE, INDEX_FILE, *(list_name(part) for part in range(len(self.info.parts)))]
        if learns(self.info.codec):
            names += [CODEBOOKS_FILE, CODEBOOKS_COPY]
        shards = [shard_path(self.folder, shard) for shard in range(self.info.shards)]
        return Manifest(
            self.info,
            {name: measure(self.folder / name) for name in names},
            [(shard.stat().st_size, checksum(read_header(shard))) for shard in shards],
        )

    def _read_back(self, shard: int) -> tuple[ShardHeader, np.ndarray, np.ndarray]:
        """A shard's header, its sums over tokens, float64 [2, C], and its sums over pixels, float64 [2, K]."""
        path, way_out = shard_path(self.folder, shard), "delete it and run the same `fastmae tokenize` again"
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header = ShardHeader.from_metadata(file.metadata(), path)
                token_sums, pixel_sums = (file.get_tensor(name) for name in SUMS)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}); {way_out}") from error
        actual = [checksum(sums.tobytes()) for sums in (token_sums, pixel_sums)]
        if actual != [header.checksums[name] for name in SUMS]:
            raise InputError(f"{path}: its sums are damaged; {way_out}")
        return header, token_sums, pixel_sums

    def _pixel_tensors(self, pixels: list[torch.Tensor]) -> dict[str, np.ndarray]:
        size = self.info.middle_size
        if self.info.pixels == "raw":
            empty = np.zeros((0, self.info.channels, size, size), np.uint8)
            return {"pixels": torch.stack(pixels).numpy() if pixels else empty}
        offsets = np.cumsum([0, *(len(jpeg) for jpeg in pixels)], dtype=np.int64)
        return {"jpeg": torch.cat(pixels).numpy() if pixels else np.zeros(0, np.uint8), "jpeg_offsets": offsets}


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


def _encoded(prefix: str, codec: Codec, tokens: torch.Tensor) -> tuple[dict[str, np.ndarray], list[bytes]]:
    """The shard's tensors of codes and, with codecs that store them, of means; and the bytes of each image's record."""
    codes, means = codec.encode_grids(tokens)
    tensors = {f"{prefix}tokens": codes}
    if means.shape[1]:
        tensors[f"{prefix}token_means"] = means
    return tensors, [code.tobytes() + mean.tobytes() for code, mean in zip(codes, means, strict=True)]


def _index_rows(images: list[ImageRecord], shards: list[int]) -> pa.Table:
    """Rows of the index, given the images and the shard of each."""
    columns = {
        "path": [_as_utf8(image.path) for image in images],
        "label": [_as_utf8(label_of(image.path)) for image in images],
        "shard": shards,
        **{name: [getattr(image, name) for image in images] for name in ("row", "width", "height", "status")},
    }
    return pa.table(columns, schema=INDEX_SCHEMA)


def _as_utf8(path: str) -> str:
    """The path, with \\x escapes for bytes that are not UTF-8: the index is for people, shards keep the bytes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _mean_and_std(prefix: str, sums: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Mean and std, float32 [C], from the sum and the sum of squares, float64 [2, C], of `count` values."""
    mean = sums[0] / count
    variance = np.maximum(sums[1] / count - mean**2, 0.0)
    return {f"{prefix}mean": mean.astype(np.float32), f"{prefix}std": np.sqrt(variance).astype(np.float32)}
