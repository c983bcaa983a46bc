"""A small store that can be edited, and whose checksums are then made right again: only its meaning is wrong.

Built by the package's own writer from random tokens, in a few milliseconds.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from safetensors.numpy import load, save

from fastmae.images import jpeg
from fastmae.images.entries import key_bytes
from fastmae.images.image_list import write_list
from fastmae.offline.middle_images import pixel_sums
from fastmae.outside.tensors import LENGTH_BYTES
from fastmae.tokens.codec import load_codec
from fastmae.tokens.encoded import EncodedImages
from fastmae.tokens.format import Part, StoreInfo, checksum, list_name, shard_path
from fastmae.tokens.shard_file import DTYPE_NAMES
from fastmae.tokens.shard_header import ImageRecord
from fastmae.tokens.writer import StoredPixels, StoreWriter, begin_folder

IMAGES, SHARD_SIZE, SKIPPED = 10, 4, 5
SIDE, PATCH, DIM = 32, 8, 8
KINDS = {
    "fp32": ("fp32", "raw", "approximate", 3),
    "fp16, flips stored": ("fp16", "raw", "stored", 1),
    "int8, JPEG": ("int8", "jpeg", "approximate", 1),
    "pq4, JPEG, flips stored": ("pq4", "jpeg", "stored", 3),
}
"""Kind of store -> its codec, pixels, flips and channels."""
TEACHER = {
    "spec": "timm/vit_tiny_patch16_224",
    "kind": "vit",
    "block": 11,
    "last": 1,
    "norm": "final",
    "input_size": 64,
    "channels": [0, 0, 0],
    "weights_sha256": "0" * 64,
    "weights_file": None,
}


def build(folder: Path, kind: str) -> Path:
    """Make a store: ten images in shards of 4, 4 and 2, one of them skipped."""
    codec_name, pixels, flips, channels = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    begin_folder(folder)
    keys = [f"class{number % 2}/{number:02d}.png" for number in range(IMAGES)]
    listed = write_list([key.encode() for key in keys], folder / list_name(0))
    part = Part(listed.images, listed.sha256, str(folder.absolute()), "folder")
    quality = 90 if pixels == "jpeg" else 0
    info = StoreInfo(
        TEACHER, DIM, SIDE, PATCH, channels, "whole", codec_name, flips, pixels, quality, SHARD_SIZE, (part,)
    )
    writer, codec = StoreWriter(folder, info), load_codec(codec_name, DIM, codebooks(codec_name, generator))
    if codec.tensors():
        writer.keep_codebooks(codec)
    for shard in range(info.shards):
        numbers = info.part_of(shard)[1]
        rows = iter(range(len(numbers)))
        records = [
            ImageRecord(key, *((-1, 0, 0, "not an image") if number == SKIPPED else (next(rows), 50, 40, "ok")))
            for number, key in zip(numbers, sorted(keys)[numbers.start : numbers.stop], strict=True)
        ]
        count = sum(record.row >= 0 for record in records)
        middle = torch.randint(0, 256, (count, channels, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        encoded = [
            EncodedImages.of(codec, torch.randn(count, SIDE // PATCH, SIDE // PATCH, DIM, generator=generator))
            for _ in range(1 + (flips == "stored"))
        ]
        jpegs = [jpeg.encode(image, quality) for image in middle] if quality else []
        stored = StoredPixels([middle], None)
        if jpegs:
            stored = StoredPixels([torch.cat(jpegs)], [[len(data) for data in jpegs]])
        writer.write_shard(shard, encoded[:1], stored, pixel_sums(middle), records, encoded[1:])
    writer.finish()
    return folder


def codebooks(codec: str, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Codebooks that decode to numbers like the tokens'."""
    if codec == "int8":
        return {"offset": np.full(DIM, -4, np.float32), "scale": np.full(DIM, 8 / 255, np.float32)}
    if codec == "pq4":
        eye = np.eye(DIM, dtype=np.float32)
        centroids = torch.randn(4, 256, DIM // 4, generator=generator).numpy()
        return {"offset": np.zeros(DIM, np.float32), "forward": eye, "inverse": eye.copy(), "centroids": centroids}
    return {}


class EditedShard:
    """A shard in memory. `sign` makes all of its checksums right, whatever was done to it.

    Attributes:
        tensors: by name.
        metadata: `version`, `shard` and `images` of the header.
        edit_header: changes the safetensors header just before it is written.
        edit_text: changes the bytes of that header.
        signs_records: whether `record_checksums` are computed anew.
    """

    def __init__(self, file: Path):
        data = file.read_bytes()
        header_bytes = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        self.file, self.tensors = file, dict(load(data))
        self.metadata = json.loads(json.loads(data[LENGTH_BYTES:header_bytes])["__metadata__"]["fastmae"])
        self.edit_header: Callable[[dict[str, Any]], None] = lambda header: None
        self.edit_text: Callable[[bytes], bytes] = lambda text: text
        self.signs_records = True

    def sign(self) -> None:
        if self.signs_records:
            self._sign_records()
        order = list(DTYPE_NAMES)
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self.tensors.items()}
        names = sorted(tensors, key=lambda name: (order.index(str(tensors[name].dtype)), name))
        value = {name: self.metadata[name] for name in ("version", "shard")}
        value["checksums"] = {name: checksum(tensors[name].tobytes()) for name in names}
        value |= {name: content for name, content in self.metadata.items() if name not in (*value, "checksum")}
        text = json.dumps({**value, "checksum": checksum(json.dumps(value).encode())})
        header, end = {"__metadata__": {"fastmae": text}}, 0
        for name in names:
            tensor, start = tensors[name], end
            end += tensor.nbytes
            dtype = DTYPE_NAMES[str(tensor.dtype)]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        self.edit_header(header)
        written = json.dumps(header, separators=(",", ":")).encode()
        written = self.edit_text(written + b" " * (-len(written) % 8))
        with self.file.open("wb") as file:
            file.write(len(written).to_bytes(8, "little") + written)
            for name in names:
                file.write(tensors[name].tobytes())

    def _sign_records(self) -> None:
        """As far as the shard's tensors still allow it."""
        table, tensors = self.tensors.get("record_checksums"), self.tensors
        if table is None or table.ndim != 2 or table.dtype != np.uint64:
            return
        for row in range(len(table)):
            for column, names in enumerate((("tokens", "token_means"), (), ("flipped_tokens", "flipped_token_means"))):
                parts = [tensors[name][row : row + 1] for name in names if name in tensors]
                if column == 1 and "pixels" in tensors:
                    parts = [tensors["pixels"][row : row + 1]]
                elif column == 1 and "jpeg_offsets" in tensors and "jpeg" in tensors:
                    start, end = (*tensors["jpeg_offsets"].ravel()[row : row + 2].tolist(), 0, 0)[:2]
                    parts = [tensors["jpeg"].ravel()[max(0, int(start)) : max(0, int(end))]]
                if column < table.shape[1]:
                    table[row, column] = xxhash.xxh3_64_intdigest(b"".join(part.tobytes() for part in parts))


class EditedStore:
    """A store in memory, file by file. `sign` writes it with checksums that are right.

    Attributes:
        info: the contents of store.json.
        shards: all shards.
        index: the contents of index.parquet.
        compression: of index.parquet.
        entries: those of the image list.
        statistics: the contents of statistics.safetensors.
        codebooks: the contents of codebooks.safetensors and, where that differs, of its copy; empty for some codecs.
        edit_manifest: changes the manifest just before it is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = json.loads((folder / "store.json").read_text())
        self.shards = [EditedShard(shard_path(folder, shard)) for shard in range(math.ceil(IMAGES / SHARD_SIZE))]
        self.index, self.compression = pq.read_table(folder / "index.parquet"), "snappy"
        self.entries = (folder / list_name(0)).read_bytes().split(b"\0")[:-1]
        self.statistics = dict(load((folder / "statistics.safetensors").read_bytes()))
        books = folder / "codebooks.safetensors"
        self.codebooks = [dict(load(books.read_bytes()))] * 2 if books.exists() else []
        self.edit_manifest: Callable[[dict[str, Any]], None] = lambda manifest: None

    def sign(self) -> None:
        """Write all files."""
        names = ["statistics.safetensors", "index.parquet", list_name(0)]
        (self.folder / names[0]).write_bytes(save(self.statistics))
        pq.write_table(self.index, self.folder / names[1], compression=self.compression)
        (self.folder / names[2]).write_bytes(b"".join(entry + b"\0" for entry in self.entries))
        for name, tensors in zip(("codebooks.safetensors", "codebooks.copy.safetensors"), self.codebooks, strict=False):
            (self.folder / name).write_bytes(save(tensors))
            names.append(name)
        for shard in self.shards:
            shard.sign()
        (self.folder / "store.json").write_text(json.dumps(self.info, indent=2) + "\n")
        listed = [shard_path(self.folder, shard).read_bytes() for shard in range(len(self.shards))]
        header_bytes = [LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little") for data in listed]
        manifest = {
            "format": "fastmae token store's manifest",
            "version": 2,
            "store": self.info,
            "files": {name: _measured((self.folder / name).read_bytes()) for name in sorted(names)},
            "shards": [[len(data), checksum(data[:length])] for data, length in zip(listed, header_bytes, strict=True)],
        }
        self.edit_manifest(manifest)
        body = json.dumps(manifest)
        (self.folder / "manifest.json").write_text(f'{{"manifest": {body}, "digest": "{checksum(body.encode())}"}}\n')

    def sign_list(self) -> None:
        """Make the number and the digest of the listed images right."""
        keys = b"".join(key_bytes(entry) + b"\0" for entry in self.entries)
        self.info["parts"][0] |= {"images": len(self.entries), "images_sha256": hashlib.sha256(keys).hexdigest()}

    def set_column(self, name: str, values: Any, kind: pa.DataType | None = None) -> None:
        """Replace a column of the index."""
        position = self.index.schema.get_field_index(name)
        self.index = self.index.set_column(position, name, pa.array(values, kind or self.index.schema.field(name).type))


def _measured(data: bytes) -> list[Any]:
    return [len(data), checksum(data)]
