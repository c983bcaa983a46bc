"""Reading a whole store again: every bit of every file against its checksum. Says what is damaged; mending is `fastmae.offline.verify`'s."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from safetensors.numpy import load_file

from fastmae.errors import InputError, first_line
from fastmae.images.image_list import ImageList
from fastmae.tokens.codec import learns, load_codec
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    MANIFEST_FILE,
    STORE_FILE,
    ShardHeader,
    StoreInfo,
    checksum,
    list_name,
    read_store_info,
    shard_name,
    shard_path,
)
from fastmae.tokens.manifest import Manifest, load_tensors, store_text
from fastmae.tokens.shard import MappedShard


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        file: its name within the store.
        what: in one line.
        shard: the shard's number, where it is one.
        images: keys of the images whose records are damaged; empty where the shard as a whole is.
    """

    file: str
    what: str
    shard: int | None = None
    images: tuple[str, ...] = ()


def audit(folder: Path, on_shard: Callable[[], object] = lambda: None) -> Iterator[Damage]:
    """Everything in a store that is damaged.

    Args:
        folder: a store of one middle size.
        on_shard: called after each shard, for progress.

    Raises:
        InputError: `folder` is no store, or store.json and manifest.json are both damaged, so that nothing says what it should hold.
    """
    info, manifest, found = _descriptions(folder)
    yield from found
    if manifest is not None and len(manifest.shards) != info.shards:
        manifest = None
        yield Damage(MANIFEST_FILE, f"does not list the {info.shards} shards of store.json")
    checks = (
        [(name, partial(manifest.check, name)) for name in manifest.files]
        if manifest is not None
        else _own_checks(folder, info)
    )
    for name, check in checks:
        try:
            check(folder / name)
        except InputError as error:
            yield Damage(name, str(error))
    for shard in range(info.shards):
        if manifest is None and not shard_path(folder, shard).exists():  # of a store that is not finished
            on_shard()
            continue
        damage = _of_shard(folder, shard, None if manifest is None else manifest.shards[shard])
        if damage is not None:
            yield damage
        on_shard()


def _own_checks(folder: Path, info: StoreInfo) -> list[tuple[str, Callable[[Path], object]]]:
    """How small files are checked without a manifest: by what store.json and they themselves say."""

    def check_list(digest: str, file: Path) -> None:
        if not file.exists() or ImageList(file).sha256() != digest:
            raise InputError(f"{file}: missing or damaged")

    def check_codebooks(other: str, file: Path) -> None:
        load_codec(info.codec, info.token_dim, load_tensors(file))
        copy = file.with_name(other)
        if copy.exists() and copy.read_bytes() != file.read_bytes():
            raise InputError(f"{file}: differs from {other}")

    lists = [(list_name(number), partial(check_list, part.images_sha256)) for number, part in enumerate(info.parts)]
    books = [
        (CODEBOOKS_FILE, partial(check_codebooks, CODEBOOKS_COPY)),
        (CODEBOOKS_COPY, partial(check_codebooks, CODEBOOKS_FILE)),
    ]
    made = any(shard_path(folder, shard).exists() for shard in range(info.shards))
    return [*lists, *(books if made and learns(info.codec) else [])]


def description_of(folder: Path) -> StoreInfo:
    """What a store is to hold, from store.json or, where that is damaged, from the manifest's copy.

    Raises:
        InputError: as `audit`.
    """
    return _descriptions(folder)[0]


def _descriptions(folder: Path) -> tuple[StoreInfo, Manifest | None, list[Damage]]:
    if not (folder / STORE_FILE).exists() and not (folder / MANIFEST_FILE).exists():
        read_store_info(folder)  # says that it is none
    try:
        manifest, bad_manifest = Manifest.read(folder / MANIFEST_FILE), None
    except InputError as error:
        manifest, bad_manifest = None, str(error)
    try:
        info, bad_info = read_store_info(folder), None
    except InputError as error:
        info, bad_info = None, str(error)
    if info is None and manifest is None:
        raise InputError(
            f"{bad_info}; and {MANIFEST_FILE}, which holds a copy of it, is missing or damaged too; tokenize again"
        )
    if (
        manifest is not None
        and bad_info is None
        and (folder / STORE_FILE).read_bytes() != store_text(manifest.info).encode()
    ):
        bad_info = "differs from the manifest's copy: damaged, or changed by hand"
    if manifest is not None and bad_info is not None:
        return manifest.info, manifest, [Damage(STORE_FILE, bad_info)]
    assert info is not None
    if bad_manifest and not (folder / MANIFEST_FILE).exists():
        there = sum(shard_path(folder, shard).exists() for shard in range(info.shards))
        bad_manifest = f"missing: the store is not finished ({there} of its {info.shards} shards are there)"
    return info, manifest, [Damage(MANIFEST_FILE, bad_manifest)] if bad_manifest else []


def _of_shard(folder: Path, shard: int, listed: tuple[int, str] | None) -> Damage | None:
    """By the manifest's entry, or, without a manifest, by what the shard says of itself."""
    path, name = shard_path(folder, shard), shard_name(shard)
    try:
        if listed is not None:
            mapped = MappedShard(path, *listed)  # size and header
        with safetensors.safe_open(path, framework="numpy") as file:
            header = ShardHeader.from_metadata(file.metadata(), path)
        if header.shard != shard:
            return Damage(name, f"holds shard {header.shard}: it was renamed", shard)
        tensors = load_file(path)
    except (InputError, OSError, safetensors.SafetensorError) as error:
        return Damage(name, first_line(error), shard)
    names = tensors.keys() | header.checksums.keys()
    bad = sorted(tensor for tensor in names if not _intact(tensors.get(tensor), header.checksums.get(tensor)))
    if not bad:
        return None
    rows = mapped.damaged_records() if listed is not None else []
    keys = {image.row: image.path for image in header.images}
    return Damage(name, f"{', '.join(bad)} differ from their checksums", shard, tuple(keys[row] for row in rows))


def _intact(tensor: Any, wanted: str | None) -> bool:
    return tensor is not None and checksum(tensor.tobytes()) == wanted
