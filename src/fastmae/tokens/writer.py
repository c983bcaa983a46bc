"""Building a store, resumable shard by shard.

A shard's contents follow from the image list and the settings alone, and a shard is either there whole or not there;
so whoever continues after a kill writes just the missing ones and ends in the same bytes.
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
from fastmae.tokens.codec import Codec, keeps_means, learns
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
"""Images a row group of the index: what is held in memory while it is written."""


class StoreWriter:
    """Opens a store for building: a new one, or one that an earlier call began with the same settings.

    Args:
        folder: the store; made when it is not there. Its image lists must lie in it already (`begin_folder`).
        info: what the store is to hold.

    Raises:
        InputError: the folder holds something else, or a store with other settings (the message says which differ).
    """

    def __init__(self, folder: Path, info: StoreInfo):
        self.folder, self.info = folder, info
        begin_folder(folder)
        description = folder / STORE_FILE
        if description.exists():
            begun = read_store_info(folder)
            differing = begun.differences(info)
            if differing:
                hint = (
                    ", or --add to take new images in" if all(name.startswith("images:") for name in differing) else ""
                )
                settings = "; ".join(differing)
                raise InputError(
                    f"{folder}: was begun with other settings ({settings}); give them again, or another folder{hint}"
                )
            self.info = begun  # the images may lie elsewhere by now; the store's bytes stay as they were begun
        else:
            self._describe(info)
        (folder / SHARDS_FOLDER).mkdir(exist_ok=True)

    def extend(self, part: Part) -> None:
        """Take another list of images in; the store is unfinished until its shards are made."""
        for name in (MANIFEST_FILE, INDEX_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self.info = replace(self.info, parts=(*self.info.parts, part))
        self._describe(self.info)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        last = (STATISTICS_FILE, INDEX_FILE, MANIFEST_FILE)
        return all((self.folder / name).exists() for name in last) and not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [shard for shard in range(self.info.shards) if not shard_path(self.folder, shard).exists()]

    def keep_codebooks(self, codec: Codec) -> None:
        """Keep what a codec has learnt; where several processes come with theirs, the first one's stands."""
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
        """Write one shard whole.

        Args:
            shard: its number.
            codec: that of the store.
            tokens: float32 [n, grid, grid, C], of the n images that were decoded.
            pixels: of the same images, uint8 [bytes] each (JPEG) or uint8 [K, S, S] each (raw).
            pixel_sums: float64 [2, K]: sum and sum of squares of each channel of their middle images, in [0, 1].
            images: all images of the shard, skipped ones too.
            flipped_tokens: of the mirrored images, like `tokens`, when the store keeps them.
        """
        tensors = self._pixel_tensors(pixels)
        records: list[list[bytes]] = [_encoded(tensors, "", codec, tokens), [kept.numpy().tobytes() for kept in pixels]]
        if flipped_tokens is not None:
            records.append(_encoded(tensors, "flipped_", codec, flipped_tokens))
        tensors["record_checksums"] = np.array(
            [[xxhash.xxh3_64_intdigest(record) for record in row] for row in zip(*records, strict=True)],
            dtype=np.uint64,
        ).reshape(len(pixels), len(records))
        # Beside the tokens, not in them: sums for the store's statistics, so that finishing reads no tokens again.
        flat = tokens.reshape(-1, self.info.token_dim).double()
        tensors["channel_sums"] = torch.stack([flat.sum(0), flat.square().sum(0)]).numpy()
        tensors["pixel_sums"] = pixel_sums.numpy()
        header = ShardHeader(
            shard, {name: checksum(np.ascontiguousarray(t).tobytes()) for name, t in tensors.items()}, images
        )
        data = save(tensors, metadata=header.to_metadata())  # as bytes: save_file writes aside under a name of its own
        write_whole(shard_path(self.folder, shard), lambda aside: aside.write_bytes(data))

    def finish(self) -> None:
        """Write the statistics, the index and the manifest of the now complete store."""
        if learns(self.info.codec):
            self._copy_codebooks()
        for folder in (self.folder, self.folder / SHARDS_FOLDER, self.folder / LISTS_FOLDER):
            remove_parts(folder)
        total, pixel_total = np.zeros((2, self.info.token_dim)), np.zeros((2, self.info.channels))
        decoded = 0
        for shard in range(self.info.shards):
            header, sums, pixel_sums = self._read_back(shard)
            total += sums
            pixel_total += pixel_sums
            decoded += sum(image.row >= 0 for image in header.images)
        if not decoded:
            first = self.header(0).images[0]
            raise InputError(
                f"{self.info.parts[0].source}: not one image could be decoded (first: {first.path}: {first.status})"
            )
        tokens = _statistics(total, decoded * self.info.grid**2)
        pixels = _statistics(pixel_total, decoded * self.info.middle_size**2)
        statistics = {**tokens, **{f"pixel_{name}": value for name, value in pixels.items()}}
        write_whole(self.folder / STATISTICS_FILE, lambda aside: aside.write_bytes(save(statistics)))
        write_whole(self.folder / INDEX_FILE, self._write_index)
        self._manifest().write(self.folder)

    def _copy_codebooks(self) -> None:
        learnt, copy = self.folder / CODEBOOKS_FILE, self.folder / CODEBOOKS_COPY
        write_new(copy, learnt.read_bytes())
        if copy.read_bytes() != learnt.read_bytes():
            raise InputError(
                f"{learnt}: differs from its copy, so one of them is damaged; `fastmae verify {self.folder} --repair`"
            )

    def header(self, shard: int) -> ShardHeader:
        """What a written shard says of itself."""
        return self._read_back(shard)[0]

    def _describe(self, info: StoreInfo) -> None:
        text = store_text(info)
        write_whole(self.folder / STORE_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))

    def _write_index(self, aside: Path) -> None:
        with (
            aside.open("wb") as opened,
            pq.ParquetWriter(opened, INDEX_SCHEMA) as file,
        ):  # pyarrow takes no path that is not UTF-8
            columns: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names}
            for shard in range(self.info.shards):
                _append(columns, self.header(shard))
                if len(columns["path"]) >= ROW_GROUP or shard == self.info.shards - 1:
                    file.write_table(pa.table(columns, schema=INDEX_SCHEMA))
                    columns = {name: [] for name in INDEX_SCHEMA.names}

    def _manifest(self) -> Manifest:
        names = [STATISTICS_FILE, INDEX_FILE, *(list_name(part) for part in range(len(self.info.parts)))]
        names += [name for name in (CODEBOOKS_FILE, CODEBOOKS_COPY) if learns(self.info.codec)]
        shards = [shard_path(self.folder, shard) for shard in range(self.info.shards)]
        return Manifest(
            self.info,
            {name: measure(self.folder / name) for name in names},
            [(shard.stat().st_size, checksum(read_header(shard))) for shard in shards],
        )

    def _read_back(self, shard: int) -> tuple[ShardHeader, np.ndarray, np.ndarray]:
        path = shard_path(self.folder, shard)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header = ShardHeader.from_metadata(file.metadata(), path)
                sums, pixel_sums = (file.get_tensor(name) for name in ("channel_sums", "pixel_sums"))
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{path}: damaged ({first_line(error)}); delete it and run the same `fastmae tokenize` again"
            ) from error
        if [header.checksums[name] for name in ("channel_sums", "pixel_sums")] != [
            checksum(t.tobytes()) for t in (sums, pixel_sums)
        ]:
            raise InputError(f"{path}: its sums are damaged; delete it and run the same `fastmae tokenize` again")
        return header, sums, pixel_sums

    def _pixel_tensors(self, pixels: list[torch.Tensor]) -> dict[str, np.ndarray]:
        size = self.info.middle_size
        if self.info.pixels == "raw":
            return {
                "pixels": torch.stack(pixels).numpy()
                if pixels
                else np.zeros((0, self.info.channels, size, size), np.uint8)
            }
        offsets = np.cumsum([0, *(len(jpeg) for jpeg in pixels)], dtype=np.int64)
        return {"jpeg": torch.cat(pixels).numpy() if pixels else np.zeros(0, np.uint8), "jpeg_offsets": offsets}


def _encoded(tensors: dict[str, np.ndarray], prefix: str, codec: Codec, tokens: torch.Tensor) -> list[bytes]:
    """Add codes, and means where the codec keeps them, to a shard's tensors; each image's bytes of both."""
    codes, means = codec.encode_grids(tokens)
    tensors[f"{prefix}tokens"] = codes
    if keeps_means(codec.name):
        tensors[f"{prefix}token_means"] = means
    return [code.tobytes() + mean.tobytes() for code, mean in zip(codes, means, strict=True)]


def begin_folder(folder: Path) -> None:
    """Make the folder of a store, with room for its image lists.

    Raises:
        InputError: it holds something that is not a store.
    """
    known = (STORE_FILE, LISTS_FOLDER)
    strange = folder.exists() and (not folder.is_dir() or holds_anything(folder))
    if strange and not any(
        (folder / name).exists() for name in known
    ):  # asked last: another process may just have begun the store
        raise InputError(f"{folder}: exists and is not a token store; give a folder that is new or empty")
    (folder / LISTS_FOLDER).mkdir(parents=True, exist_ok=True)


def _append(columns: dict[str, list], header: ShardHeader) -> None:
    for image in header.images:
        columns["path"].append(_as_utf8(image.path))
        columns["label"].append(_as_utf8(label_of(image.path)))
        columns["shard"].append(header.shard)
        for name in ("row", "width", "height", "status"):
            columns[name].append(getattr(image, name))


def _as_utf8(path: str) -> str:
    """A file name that is not UTF-8 is kept exactly in the shard; the index, for people, shows \\x escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _statistics(total: np.ndarray, count: int) -> dict[str, np.ndarray]:
    mean = total[0] / count
    variance = np.maximum(total[1] / count - mean**2, 0.0)
    return {"mean": mean.astype(np.float32), "std": np.sqrt(variance).astype(np.float32)}
