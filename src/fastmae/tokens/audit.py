"""Checks every bit of a whole store against its checksums and tells what is damaged. `offline.verify` repairs it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
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

Check = Callable[[Path], object]
"""Raises an InputError where a file is not as it was written."""


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written.

    Attributes:
        file: name within the store.
        what: the damage, in one line.
        shard: number of the shard, where the file is one.
        images: keys of the images whose records are damaged; empty where the whole shard, or another file, is.
    """

    file: str
    what: str
    shard: int | None = None
    images: tuple[str, ...] = ()


def audit(folder: Path, on_shard: Callable[[], object] = lambda: None) -> Iterator[Damage]:
    """Find all damage in a store.

    Args:
        folder: a store of one middle size.
        on_shard: called after each shard, for progress.

    Raises:
        InputError: `folder` is no store, or store.json and manifest.json are both damaged: nothing tells what it should
            hold.
    """
    info, manifest, damages = _descriptions(folder)
    yield from damages
    if manifest is not None and len(manifest.shards) != info.shards:
        manifest = None
        yield Damage(MANIFEST_FILE, f"does not list the {info.shards} shards of store.json")
    for name, check in _small_file_checks(folder, info, manifest):
        try:
            check(folder / name)
        except InputError as error:
            yield Damage(name, str(error))
    for shard in range(info.shards):
        unwritten = manifest is None and not shard_path(folder, shard).exists()  # of a store that is not finished
        damage = None if unwritten else _audit_shard(folder, shard, manifest)
        if damage is not None:
            yield damage
        on_shard()


def description_of(folder: Path) -> StoreInfo:
    """What a store should hold, from store.json or, where that is damaged, from the manifest's copy.

    Raises:
        InputError: as `audit`.
    """
    return _descriptions(folder)[0]


def _descriptions(folder: Path) -> tuple[StoreInfo, Manifest | None, list[Damage]]:
    """What the store should hold, its manifest unless damaged, and the damage to store.json and manifest.json."""
    store_file, manifest_file = folder / STORE_FILE, folder / MANIFEST_FILE
    if not manifest_file.exists() and not store_file.exists():
        read_store_info(folder)  # raises the error of a folder that is no store
    info, manifest, info_damage, manifest_damage = None, None, None, None
    try:
        manifest = Manifest.read(manifest_file)
    except InputError as error:
        manifest_damage = str(error)
    try:
        info = read_store_info(folder)
        if manifest is not None and store_file.read_bytes() != store_text(manifest.info).encode():
            info_damage = "differs from the manifest's copy: damaged, or changed by hand"
    except InputError as error:
        info_damage = str(error)
    if manifest is not None:
        return manifest.info, manifest, [Damage(STORE_FILE, info_damage)] if info_damage else []
    if info is None:
        both = f"{info_damage}; and {MANIFEST_FILE}, which holds a copy of it, is missing or damaged too"
        raise InputError(f"{both}; tokenize again")
    if not manifest_file.exists():
        written = sum(shard_path(folder, shard).exists() for shard in range(info.shards))
        manifest_damage = f"missing: the store is not finished ({written} of its {info.shards} shards are there)"
    return info, None, [Damage(MANIFEST_FILE, str(manifest_damage))]


def _small_file_checks(folder: Path, info: StoreInfo, manifest: Manifest | None) -> list[tuple[str, Check]]:
    """The name and the check of each small file: against the manifest, or else against store.json and each other."""
    if manifest is not None:
        return [(name, partial(manifest.check, name)) for name in manifest.files]

    def check_list(digest: str, file: Path) -> None:
        if not file.exists() or ImageList(file).sha256() != digest:
            raise InputError(f"{file}: missing or damaged")

    def check_codebooks(other: str, file: Path) -> None:
        load_codec(info.codec, info.token_dim, load_tensors(file))
        copy = file.with_name(other)
        if copy.exists() and copy.read_bytes() != file.read_bytes():
            raise InputError(f"{file}: differs from {other}")

    checks: list[tuple[str, Check]] = [
        (list_name(number), partial(check_list, part.images_sha256)) for number, part in enumerate(info.parts)
    ]
    if learns(info.codec) and any(shard_path(folder, shard).exists() for shard in range(info.shards)):
        checks.append((CODEBOOKS_FILE, partial(check_codebooks, CODEBOOKS_COPY)))
        checks.append((CODEBOOKS_COPY, partial(check_codebooks, CODEBOOKS_FILE)))
    return checks


def _audit_shard(folder: Path, shard: int, manifest: Manifest | None) -> Damage | None:
    """Check a shard against the manifest, if there is one, and against its own header."""
    path, name = shard_path(folder, shard), shard_name(shard)
    try:
        mapped = None if manifest is None else MappedShard(path, *manifest.shards[shard])  # checks size and header
        header = ShardHeader.from_file(path)
        if header.shard != shard:
            return Damage(name, f"holds shard {header.shard}: it was renamed", shard)
        tensors = load_file(path)
    except (InputError, OSError, safetensors.SafetensorError) as error:
        return Damage(name, first_line(error), shard)
    names = sorted(tensors.keys() | header.checksums.keys())
    damaged = [tensor for tensor in names if not _intact(tensors.get(tensor), header.checksums.get(tensor))]
    if not damaged:
        return None
    rows = mapped.damaged_records() if mapped is not None else []
    keys = {image.row: image.path for image in header.images}
    return Damage(name, f"{', '.join(damaged)} differ from their checksums", shard, tuple(keys[row] for row in rows))


def _intact(tensor: np.ndarray | None, expected: str | None) -> bool:
    return tensor is not None and checksum(tensor.tobytes()) == expected
