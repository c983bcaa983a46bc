"""Building a store, resumable shard by shard.

A shard's contents follow from the image list and the settings alone, and a shard is either there whole or not there;
so whoever continues after a kill writes just the missing ones and ends in the same bytes.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from safetensors.numpy import save

from fastmae.durable import holds_anything, remove_parts, write_json, write_whole
from fastmae.errors import InputError, first_line
from fastmae.images.sources import label_of
from fastmae.tokens import codec as codecs
from fastmae.tokens.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    SHARDS_FOLDER,
    STATISTICS_FILE,
    STORE_FILE,
    ImageRecord,
    ShardHeader,
    StoreInfo,
    checksum,
    read_store_info,
    shard_path,
)


class StoreWriter:
    """Opens a store for building: a new one, or one that an earlier call began with the same settings.

    Args:
        folder: the store; made when it is not there.
        info: what the store is to hold.

    Raises:
        InputError: the folder holds something else, or a store with other settings (the message says which differ).
    """

    def __init__(self, folder: Path, info: StoreInfo):
        self.folder, self.info = folder, info
        description = folder / STORE_FILE
        strange = folder.exists() and (not folder.is_dir() or holds_anything(folder))
        if strange and not description.exists():  # asked last: another process may just have begun the store
            raise InputError(f"{folder}: exists and is not a token store; give a folder that is new or empty")
        if description.exists():
            begun = read_store_info(folder)
            differing = begun.differences(info)
            if differing:
                raise InputError(f"{folder}: was begun with other settings ({'; '.join(differing)}); give them again, or another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not description.exists():
            write_json(description, info.to_json())
        (folder / SHARDS_FOLDER).mkdir(exist_ok=True)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        last = (STATISTICS_FILE, INDEX_FILE)
        return all((self.folder / name).exists() for name in last) and not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [shard for shard in range(self.info.shards) if not shard_path(self.folder, shard).exists()]

    def write_shard(
        self,
        shard: int,
        tokens: torch.Tensor,
        pixels: list[torch.Tensor],
        pixel_sums: torch.Tensor,
        images: list[ImageRecord],
        flipped_tokens: torch.Tensor | None = None,
    ) -> None:
        """Write one shard whole.

        Args:
            shard: its number.
            tokens: float32 [n, grid, grid, C], of the n images that were decoded.
            pixels: of the same images, uint8 [bytes] each (JPEG) or uint8 [K, S, S] each (raw).
            pixel_sums: float64 [2, K]: sum and sum of squares of each channel of their middle images, in [0, 1].
            images: all images of the shard, skipped ones too.
            flipped_tokens: of the mirrored images, like `tokens`, when the store keeps them.
        """
        tensors = {"tokens": codecs.encode(tokens, self.info.codec), **self._pixel_tensors(pixels)}
        if flipped_tokens is not None:
            tensors["flipped_tokens"] = codecs.encode(flipped_tokens, self.info.codec)
        # Beside the tokens, not in them: sums for the store's statistics, so that finishing reads no tokens again.
        flat = tokens.reshape(-1, self.info.token_dim).double()
        tensors["channel_sums"] = torch.stack([flat.sum(0), flat.square().sum(0)]).numpy()
        tensors["pixel_sums"] = pixel_sums.numpy()
        header = ShardHeader(shard, {name: checksum(np.ascontiguousarray(t).data) for name, t in tensors.items()}, images)
        data = save(tensors, metadata=header.to_metadata())  # as bytes: save_file writes aside under a name of its own
        write_whole(shard_path(self.folder, shard), lambda aside: aside.write_bytes(data))

    def finish(self) -> None:
        """Write the statistics and the index of the now complete store."""
        remove_parts(self.folder / SHARDS_FOLDER)
        remove_parts(self.folder)
        total, pixel_total = np.zeros((2, self.info.token_dim)), np.zeros((2, self.info.channels))
        columns: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names}
        decoded = 0
        for shard in range(self.info.shards):
            header, sums, pixel_sums = self._read_back(shard)
            total += sums
            pixel_total += pixel_sums
            decoded += sum(image.row >= 0 for image in header.images)
            _append(columns, header)
        if not decoded:
            raise InputError(f"{self.info.source}: not one image could be decoded (first: {columns['path'][0]}: {columns['status'][0]})")
        tokens = _statistics(total, decoded * self.info.grid**2)
        pixels = _statistics(pixel_total, decoded * self.info.middle_size**2)
        statistics = {**tokens, **{f"pixel_{name}": value for name, value in pixels.items()}}
        write_whole(self.folder / STATISTICS_FILE, lambda aside: aside.write_bytes(save(statistics)))
        table = pa.table(columns, schema=INDEX_SCHEMA)
        write_whole(self.folder / INDEX_FILE, lambda aside: pq.write_table(table, aside))

    def header(self, shard: int) -> ShardHeader:
        """What a written shard says of itself."""
        return self._read_back(shard)[0]

    def _read_back(self, shard: int) -> tuple[ShardHeader, np.ndarray, np.ndarray]:
        path = shard_path(self.folder, shard)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header = ShardHeader.from_metadata(file.metadata(), path)
                return header, file.get_tensor("channel_sums"), file.get_tensor("pixel_sums")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}); delete it and run the same `fastmae tokenize` again") from error

    def _pixel_tensors(self, pixels: list[torch.Tensor]) -> dict[str, np.ndarray]:
        size = self.info.middle_size
        if self.info.pixels == "raw":
            return {"pixels": torch.stack(pixels).numpy() if pixels else np.zeros((0, self.info.channels, size, size), np.uint8)}
        offsets = np.cumsum([0, *(len(jpeg) for jpeg in pixels)], dtype=np.int64)
        return {"jpeg": torch.cat(pixels).numpy() if pixels else np.zeros(0, np.uint8), "jpeg_offsets": offsets}


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
