"""What a stranger could do to a store before making its checksums right again: kinds of edits, each by its name."""

import contextlib
import copy
import io
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from tokens.edited_store import EditedShard, EditedStore

Edit = Callable[[EditedStore, Random], None]
EDITS: dict[str, Edit] = {}
"""Name -> edit. An edit draws its details from the random numbers that it gets."""

DEEP: Any = "deep"
for _ in range(50):
    DEEP = [DEEP]
VALUES = (
    0,
    -1,
    1,
    2,
    3,
    16,
    1 << 31,
    1 << 40,
    1 << 63,
    1 << 70,
    0.5,
    1e308,
    "",
    "x",
    "é\n",
    "\udc80",
    None,
    True,
    [],
    {},
)
PLAUSIBLE = {
    "token_dim": (4, 7, 16),
    "middle_size": (16, 24, 64, 1 << 14),
    "patch_size": (4, 16, 32),
    "channels": (1, 2, 3, 4),
    "grid": (2, 8),
    "resize": ("center-crop", "stretch"),
    "codec": ("fp32", "fp16", "int8", "pq1", "pq4", "pq8", "pq9", "pq0", "auto", "pq4\n"),
    "flips": ("stored", "approximate", "none"),
    "pixels": ("jpeg", "raw", "png"),
    "jpeg_quality": (0, 1, 50, 100, 101),
    "shard_size": (1, 3, 5, 10, 1 << 20),
}
NUMBERS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-30, 1e5, -1e8, 1e12, 3e38, -3e38)
TENSORS = ("tokens", "token_means", "flipped_tokens", "flipped_token_means", "pixels", "jpeg", "jpeg_offsets")
TENSORS += ("record_checksums", "channel_sums", "pixel_sums")
SAFETENSORS_DTYPES = ("BF16", "F8_E4M3", "F64", "F32", "F16", "I64", "U64", "I8", "U8", "BOOL", "", "f32", 4, None)


def apply(name: str, store: EditedStore, random: Random) -> None:
    """Edit a store. After another edit, there may be nothing left that this one could change."""
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
        EDITS[name](store, random)


def edit(name: str) -> Callable[[Edit], Edit]:
    def register(function: Edit) -> Edit:
        EDITS[name] = function
        return function

    return register


# What the descriptions say.


@edit("a field of store.json has another value")
def _(store, random):
    store.info[random.choice(sorted(store.info))] = copy.deepcopy(random.choice((*VALUES, DEEP)))


@edit("a field of store.json has another plausible value")
def _(store, random):
    name = random.choice(sorted(PLAUSIBLE))
    store.info[name] = random.choice(PLAUSIBLE[name])
    if name in ("middle_size", "patch_size") and random.random() < 0.7:
        store.info["grid"] = store.info["middle_size"] // store.info["patch_size"]


@edit("a field of store.json is gone, or is new")
def _(store, random):
    if random.random() < 0.7:
        del store.info[random.choice(sorted(store.info))]
    else:
        store.info["more"] = random.choice(VALUES)


@edit("a field of the teacher's entry is another")
def _(store, random):
    entry = dict(store.info["teacher"]) if isinstance(store.info.get("teacher"), dict) else {}
    name = random.choice((*sorted(entry), "precision", "extra"))
    if random.random() < 0.2:
        entry.pop(name, None)
    else:
        entry[name] = random.choice((*VALUES, "cnn", "vit", "none", "tf32", [0, 1, 2], [0, 0, 9], ["0", 0, 0]))
    store.info["teacher"] = entry


@edit("a field of the parts is another")
def _(store, random):
    parts = copy.deepcopy(store.info["parts"]) if isinstance(store.info.get("parts"), list) else []
    if parts and random.random() < 0.8:
        name = random.choice(("images", "images_sha256", "source", "kind"))
        parts[0][name] = random.choice((*VALUES, 9, 11, "tar", "folder", "/", "/x/../y", "x/y", "0" * 64))
    else:
        parts = random.choice((parts * 2, parts * 5000, [], [3], DEEP))
    store.info["parts"] = parts


@edit("the manifest lists other sizes or checksums")
def _(store, random):
    def change(manifest):
        entry = random.choice([*manifest["files"].values(), *manifest["shards"]])
        place = random.randrange(2)
        entry[place] = random.choice((*VALUES, "0" * 16, 1 << 50))

    store.edit_manifest = change


@edit("the manifest lists other files")
def _(store, random):
    def change(manifest):
        files, shards = manifest["files"], manifest["shards"]
        choice = random.randrange(6)
        if choice == 0:
            files[random.choice(("../../etc/passwd", "lists/1.list", "shards/00000.safetensors", ""))] = [1, "0" * 16]
        elif choice == 1:
            files.pop(random.choice(sorted(files)))
        elif choice == 2:
            shards.pop()
        elif choice == 3:
            shards.append(shards[0])
        elif choice == 4:
            shards[0], shards[1] = shards[1], shards[0]
        else:
            manifest[random.choice(sorted(manifest))] = random.choice((*VALUES, DEEP))

    store.edit_manifest = change


# What the headers of the shards say.


def some_shard(store: EditedStore, random: Random) -> EditedShard:
    return random.choice(store.shards)


@edit("a tensor has another dtype by the header")
def _(store, random):
    name, dtype = random.choice(TENSORS), random.choice(SAFETENSORS_DTYPES)
    some_shard(store, random).edit_header = lambda header: header.get(name, {}).update(dtype=dtype)


@edit("a tensor has another shape by the header")
def _(store, random):
    name = random.choice(TENSORS)

    def change(header):
        shape = header.get(name, {}).get("shape", [])
        place = random.randrange(max(1, len(shape)))
        others = (-1, 0, 1, 2, 1 << 40, 1 << 63, 0.5, "4", None)
        shape[place : place + 1] = random.choice(([random.choice(others)], [1, *shape[place : place + 1]], [], shape))

    some_shard(store, random).edit_header = change


@edit("a tensor lies elsewhere by the header")
def _(store, random):
    name, other = random.sample(TENSORS, 2)

    def change(header):
        if name in header:
            start, stop = header[name]["data_offsets"]
            moved = random.choice((-8, -1, 1, 8, 64, 1 << 40, -(1 << 62)))
            choices = [[start + moved, stop + moved], [stop, start], [start, stop + moved], [start], [0.5, 1], None]
            choices.append(header.get(other, header[name])["data_offsets"])
            header[name]["data_offsets"] = random.choice(choices)

    some_shard(store, random).edit_header = change


@edit("a header lacks its metadata, or has others")
def _(store, random):
    def change(header):
        choice = random.randrange(5)
        if choice == 0:
            del header["__metadata__"]
        elif choice == 1:
            header["__metadata__"]["more"] = "x"
        elif choice == 2:
            header["__metadata__"] = random.choice(({}, [], {"fastmae": "[" * 9999}, {"fastmae": 3}, {"fastmae": "{}"}))
        elif choice == 3:
            header["__metadata__"]["fastmae"] = header["__metadata__"]["fastmae"].replace("00", "01", 1)
        else:
            header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}

    some_shard(store, random).edit_header = change


@edit("a header is no JSON, or is padded")
def _(store, random):
    padding = random.choice((b" ", b"\0")) * random.choice((1, 8, 1 << 22))
    others = (
        lambda text: text + padding,
        lambda text: text[:-9],
        lambda _: b"[" * 9999,
        lambda _: b"",
        lambda _: b"[]",
    )
    some_shard(store, random).edit_text = random.choice(others)


@edit("the metadata say otherwise of the images")
def _(store, random):
    shard = some_shard(store, random)
    images = shard.metadata["images"]
    image = random.choice(images)
    choice = random.randrange(6)
    if choice == 0:
        image[random.randrange(5)] = random.choice((*VALUES, "ok", "class0/00.png"))
    elif choice == 1:
        images.append(list(image))
    elif choice == 2:
        images.remove(image)
    elif choice == 3:
        images.reverse()
    elif choice == 4:
        image[1:] = random.choice(([-1, 0, 0, "ok"], [0, 5, 5, "broken"], [7, 5, 5, "ok"], [0, 5, 5]))
    else:
        shard.metadata["images"] = random.choice(([], {}, DEEP, None, [[]] * len(images)))


@edit("the metadata have another version or number")
def _(store, random):
    some_shard(store, random).metadata[random.choice(("version", "shard"))] = random.choice((*VALUES, DEEP))


@edit("two shards have each other's place")
def _(store, random):
    first, second = random.sample(store.shards, 2)
    first.file, second.file = second.file, first.file
    if random.random() < 0.5:
        first.metadata["shard"], second.metadata["shard"] = second.metadata["shard"], first.metadata["shard"]


# What the shards hold.


def some_tensor(shard: EditedShard, random: Random) -> str:
    return random.choice(sorted(shard.tensors))


@edit("a tensor holds other numbers")
def _(store, random):
    shard = some_shard(store, random)
    names = [name for name in sorted(shard.tensors) if shard.tensors[name].dtype.kind == "f"]
    tensor = shard.tensors[random.choice(names)]
    with np.errstate(all="ignore"):
        number = tensor.dtype.type(random.choice(NUMBERS))
    if random.random() < 0.5:
        tensor[...] = number
    elif tensor.size:
        tensor.reshape(-1)[random.randrange(tensor.size)] = number


@edit("a tensor holds other bytes")
def _(store, random):
    shard = some_shard(store, random)
    tensor = shard.tensors[some_tensor(shard, random)]
    data = tensor.reshape(-1).view(np.uint8)
    for _ in range(random.choice((1, 8, 200))):
        if data.size:
            data[random.randrange(data.size)] = random.randrange(256)


@edit("a tensor is gone, or is new")
def _(store, random):
    shard = some_shard(store, random)
    if random.random() < 0.5:
        del shard.tensors[some_tensor(shard, random)]
    else:
        name = random.choice([*TENSORS, "more"])
        shard.tensors.setdefault(name, np.zeros(random.choice((0, 1, (4, 8), (4, 4, 4, 8))), np.float16))


@edit("a tensor has another shape")
def _(store, random):
    shard = some_shard(store, random)
    name = some_tensor(shard, random)
    tensor = shard.tensors[name]
    shapes = [tensor[1:], tensor[:0], tensor.reshape(-1), tensor[None], np.concatenate([tensor, tensor]), tensor.T]
    shard.tensors[name] = random.choice(shapes).copy()


@edit("a tensor has another dtype")
def _(store, random):
    shard = some_shard(store, random)
    name = some_tensor(shard, random)
    with np.errstate(all="ignore"):
        dtype = random.choice((np.float64, np.float32, np.float16, np.int64, np.uint64, np.uint8))
        shard.tensors[name] = shard.tensors[name].astype(dtype)


@edit("the checksums of the records are others")
def _(store, random):
    shard = some_shard(store, random)
    shard.signs_records = False
    table = shard.tensors["record_checksums"]
    others = (np.zeros_like(table), table[:, :1], table[:-1], table[0], table[::-1], np.concatenate([table, table], 1))
    shard.tensors["record_checksums"] = random.choice(others).copy()


@edit("the offsets of the JPEGs are others")
def _(store, random):
    shard = some_shard(store, random)
    offsets = shard.tensors.get("jpeg_offsets")
    if offsets is not None and offsets.size:
        offsets[random.randrange(len(offsets))] = random.choice((-1, 0, 1, 100, 10**6, 1 << 62, -(1 << 62)))


@edit("a JPEG is another image")
def _(store, random):
    shard = some_shard(store, random)
    if "jpeg" not in shard.tensors or "jpeg_offsets" not in shard.tensors:
        return
    offsets = shard.tensors["jpeg_offsets"].ravel().astype(int).clip(0, shard.tensors["jpeg"].size)
    images = [shard.tensors["jpeg"].ravel()[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    if images:
        at = random.randrange(len(images))
        images[at] = other_jpeg(images[at], random)
        shard.tensors["jpeg"] = np.frombuffer(bytearray(b"".join(images)), np.uint8)
        shard.tensors["jpeg_offsets"] = np.cumsum([0, *map(len, images)], dtype=np.int64)


def other_jpeg(data: bytes, random: Random) -> bytes:
    side, mode = random.choice((8, 16, 24, 32, 40, 512)), random.choice(("RGB", "L", "CMYK"))
    image, out = Image.effect_noise((side, side), 50).convert(mode), io.BytesIO()
    options = random.choice(({"restart_marker_blocks": 1}, {"progressive": True}, {"quality": 100}, {"subsampling": 0}))
    choice = random.randrange(5)
    if choice == 0:
        return data[: random.randrange(len(data) + 1)]
    if choice == 1 and data:
        broken = bytearray(data)
        for _ in range(random.choice((1, 20))):
            broken[random.randrange(len(data))] = random.choice((0, 255, 0xD0, 0xD9, random.randrange(256)))
        return bytes(broken)
    if choice == 2:
        return random.choice((b"", b"x", b"<html>", data + b"x", data * 2))
    image.save(out, random.choice(("JPEG", "JPEG", "PNG")) if mode != "CMYK" else "JPEG", **options)
    return out.getvalue()


# What lies beside the shards.


@edit("the index has other shards or rows")
def _(store, random):
    name = random.choice(("shard", "row"))
    if name not in store.index.schema.names:
        return
    values = store.index[name].to_pylist()
    at = random.randrange(max(1, len(values)))
    choice = random.randrange(4)
    if choice == 0:
        values[at : at + 1] = [random.choice((-2, -1, 0, 1, 3, 4, 1 << 20, (1 << 31) - 1, None))]
    elif choice == 1:
        random.shuffle(values)
    elif choice == 2:
        values = [-1] * len(values)
    else:
        values = [0] * len(values)
    if len(values) == len(store.index):
        store.set_column(name, values)


@edit("the index has other texts or sizes")
def _(store, random):
    name = random.choice(("path", "label", "status", "width", "height"))
    if name not in store.index.schema.names or not len(store.index):
        return
    values = store.index[name].to_pylist()
    others = (-1, 0, 7, None) if name in ("width", "height") else ("", "x", "é" * 9999, "ok", None)
    values[random.randrange(len(values))] = random.choice(others)
    store.set_column(name, values)


@edit("the index has other rows or columns")
def _(store, random):
    table = store.index
    name = random.choice(table.schema.names)
    kinds = (pa.int64(), pa.float32(), pa.string(), pa.int8(), pa.list_(pa.int32()))
    choice = random.randrange(6)
    if choice == 0:
        store.index = table.slice(random.randrange(len(table) + 1))
    elif choice == 1:
        store.index = pa.concat_tables([table] * random.choice((2, 500)))
    elif choice == 2:
        store.index = table.drop_columns([name])
    elif choice == 3:
        store.index = table.rename_columns(
            [f"{column}_" if column == name else column for column in table.schema.names]
        )
    elif choice == 4:
        store.set_column(name, [None] * len(table), random.choice(kinds))
    else:
        store.compression = random.choice(("zstd", "gzip", "none", "brotli"))


@edit("the index unfolds to gigabytes")
def _(store, random):
    if "path" in store.index.schema.names:
        text = "x" * (1 << 17)  # Parquet keeps it once, however many rows name it
        store.set_column("path", [text] * len(store.index))
        store.index = pa.concat_tables([store.index] * random.choice((1, 1000)))
        if random.random() < 0.5 and isinstance(store.info.get("parts"), list) and store.info["parts"]:
            store.info["parts"][0]["images"] = len(store.index)


@edit("the list names other images")
def _(store, random):
    entries = store.entries
    at = random.randrange(max(1, len(entries)))
    choice = random.randrange(5)
    if choice == 0:
        entries[at : at + 1] = [random.choice((b"x", b"class0/00.png", b"z" * 9999, b"\xff", b"a\x01b", b""))]
    elif choice == 1:
        entries[at : at + 1] = []
    elif choice == 2:
        entries.reverse()
    elif choice == 3:
        entries.append(b"zzz")
    else:
        entries *= 2
    if random.random() < 0.7 and store.info.get("parts") and isinstance(store.info["parts"][0], dict):
        store.sign_list()


@edit("the statistics are others")
def _(store, random):
    edit_arrays(store.statistics, random)


@edit("the statistics and the sums they come from are others")
def _(store, random):
    number = random.choice((np.nan, np.inf, -1.0, 0.0, 1e20, 1e200))
    for shard in store.shards:
        for name in ("channel_sums", "pixel_sums"):
            if name in shard.tensors and shard.tensors[name].dtype.kind == "f":
                with np.errstate(all="ignore"):
                    shard.tensors[name][...] = number
    for array in store.statistics.values():
        with np.errstate(all="ignore"):
            array[...] = number if array.dtype.kind == "f" else 0


@edit("the codebooks are others")
def _(store, random):
    if store.codebooks:
        books = {name: array.copy() for name, array in store.codebooks[0].items()}
        edit_arrays(books, random)
        store.codebooks = [books, books] if random.random() < 0.7 else [store.codebooks[0], books]


def edit_arrays(arrays: dict[str, np.ndarray], random: Random) -> None:
    """Change float32 tensors of a small file."""
    name = random.choice(sorted(arrays)) if arrays else "mean"
    array = arrays.get(name, np.zeros(1, np.float32)).copy()
    choice = random.randrange(6)
    if choice == 0:
        array[...] = random.choice(NUMBERS)
    elif choice == 1 and array.size:
        array.reshape(-1)[random.randrange(array.size)] = random.choice(NUMBERS)
    elif choice == 2:
        array = random.choice((array[:0], array[1:], array[None], np.concatenate([array, array])))
    elif choice == 3:
        with np.errstate(all="ignore"):
            array = array.astype(random.choice((np.float64, np.float16, np.int64, np.uint8)))
    elif choice == 4:
        arrays["more"] = array
    else:
        arrays.pop(name, None)
        return
    arrays[name] = array.copy()
