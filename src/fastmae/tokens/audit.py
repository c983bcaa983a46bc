"""Checks a whole store and tells what is damaged: every bit by its checksum, and whether what it holds makes sense.

What passes can be trained on. `offline.verify` repairs what does not.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastmae.errors import InputError
from fastmae.images.image_list import ImageList
from fastmae.outside.regular_file import read_bounded
from fastmae.runtime.device import own_cores
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.codec import learns, learnt_shapes, load_codec
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    LARGEST_DESCRIPTION,
    MANIFEST_FILE,
    STORE_FILE,
    Part,
    StoreInfo,
    checksum,
    list_name,
    read_store_info,
    shard_name,
    shard_path,
    written_shards,
)
from fastmae.tokens.manifest import Manifest, store_text
from fastmae.tokens.meaning import Agreement, bad_records
from fastmae.tokens.shard import MappedShard
from fastmae.tokens.shard_file import as_bytes
from fastmae.tokens.shard_header import ImageRecord, ShardHeader
from fastmae.tokens.statistics import SUMS
from fastmae.tokens.tensor_file import largest_file, load_tensors
from fastmae.tokens.transfer import WrongSizeError

Check = Callable[[Path], object]
"""Raises an InputError where a file is not as it was written."""
Bring = Callable[[str], AbstractContextManager[object]]


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


def here(name: str) -> AbstractContextManager[object]:
    """Nothing has to be done so that a shard of a folder is there."""
    return nullcontext()


def audit(folder: Path, on_shard: Callable[[], object] = lambda: None, bring: Bring = here) -> Iterator[Damage]:
    """Find all damage in a store.

    Args:
        folder: a store of one middle size.
        on_shard: called after each shard, for progress.
        bring: (name) -> a context in which that shard lies in the folder.

    Raises:
        InputError: `folder` is no store, or store.json and manifest.json are both damaged: nothing tells what it should
            hold.
    """
    info, manifest, damages = _descriptions(folder)
    yield from damages
    sound: set[str] = set()
    for name, check in _small_file_checks(folder, info, manifest):
        try:
            check(folder / name)
            sound.add(name)
        except InputError as error:
            yield Damage(name, str(error))
    agreement = Agreement(folder, info, sound if manifest is not None else set())
    # Without a manifest, the store may be unfinished, and shards that were not written yet are no damage.
    shards: Iterable[int] = range(info.shards)
    if manifest is None:
        shards = sorted(shard for shard in written_shards(folder) if shard < info.shards)
    for shard, audited in zip(shards, _audited(folder, info, manifest, shards, bring), strict=True):
        damage = audited.damage
        if damage is not None:
            agreement.skip(shard)
        elif (what := agreement.add(shard, audited.images, audited.sums)) is not None:
            damage = Damage(shard_name(shard), what, shard)
        if damage is not None:
            yield damage
        on_shard()
    for name, what in agreement.end().items():
        yield Damage(name, what)


@dataclass(frozen=True)
class _Audited:
    """What was found in a shard: the damage to it, or else what is to be compared with the store's other files."""

    damage: Damage | None
    images: list[ImageRecord]
    sums: dict[str, np.ndarray]


def _audited(
    folder: Path, info: StoreInfo, manifest: Manifest | None, shards: Iterable[int], bring: Bring
) -> Iterator[_Audited]:
    """The outcome for each shard, in their order. A thread for each core reads, hashes and decodes."""
    threads = own_cores()
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[_Audited]] = deque()
        for shard in shards:
            running.append(pool.submit(_audit_shard, folder, info, shard, manifest, bring))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


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
    text = "" if manifest is None else store_text(manifest.info)
    try:
        info = read_store_info(folder)
        if manifest is not None and read_bounded(store_file, LARGEST_DESCRIPTION) != text.encode():
            info_damage = "differs from the manifest's copy: damaged, or changed by hand"
    except InputError as error:
        info_damage = str(error)
    if manifest is not None:
        return manifest.info, manifest, [Damage(STORE_FILE, info_damage)] if info_damage else []
    if info is None:
        both = f"{info_damage}; and {MANIFEST_FILE}, which holds a copy of it, is missing or damaged too"
        raise InputError(f"{both}; tokenize again")
    if not manifest_file.exists():
        written = len(written_shards(folder))
        manifest_damage = f"missing: the store is not finished ({written} of its {info.shards} shards are there)"
    return info, None, [Damage(MANIFEST_FILE, str(manifest_damage))]


def _small_file_checks(folder: Path, info: StoreInfo, manifest: Manifest | None) -> list[tuple[str, Check]]:
    """The name and the check of each small file: against the manifest, or else against store.json and each other."""
    if manifest is not None:
        lists = {list_name(number): part for number, part in enumerate(info.parts)}

        def check(name: str, file: Path) -> None:
            manifest.check(name, file)
            if name in lists:
                _check_list(lists[name], file)
            if name == CODEBOOKS_COPY and manifest.files[name] != manifest.files[CODEBOOKS_FILE]:
                raise InputError(f"{file}: differs from {CODEBOOKS_FILE}")

        return [(name, partial(check, name)) for name in manifest.files]

    def check_codebooks(other: str, file: Path) -> None:
        shapes = learnt_shapes(info.codec, info.token_dim)
        load_codec(info.codec, info.token_dim, load_tensors(file, shapes))
        copy, largest = file.with_name(other), largest_file(shapes)
        if copy.exists() and read_bounded(copy, largest) != read_bounded(file, largest):
            raise InputError(f"{file}: differs from {other}")

    checks: list[tuple[str, Check]] = [
        (list_name(number), partial(_check_list, part)) for number, part in enumerate(info.parts)
    ]
    if learns(info.codec) and written_shards(folder):
        checks.append((CODEBOOKS_FILE, partial(check_codebooks, CODEBOOKS_COPY)))
        checks.append((CODEBOOKS_COPY, partial(check_codebooks, CODEBOOKS_FILE)))
    return checks


def _check_list(part: Part, file: Path) -> None:
    if not file.exists():
        raise InputError(f"{file}: missing")
    images = ImageList(file)
    if len(images) != part.images or images.sha256() != part.images_sha256:
        raise InputError(f"{file}: does not hold the images that {STORE_FILE} says")


def _audit_shard(folder: Path, info: StoreInfo, shard: int, manifest: Manifest | None, bring: Bring) -> _Audited:
    """Check a shard against the manifest, if there is one, and its bytes and its records against its own header."""
    name = shard_name(shard)
    try:
        with bring(name):
            return _audit_file(folder, info, shard, manifest)
    except (MissingFileError, WrongSizeError) as error:  # of a shard that is behind a URL
        return _Audited(Damage(name, str(error), shard), [], {})


def _audit_file(folder: Path, info: StoreInfo, shard: int, manifest: Manifest | None) -> _Audited:
    path, name = shard_path(folder, shard), shard_name(shard)

    def damaged(what: str, images: Iterable[str] = ()) -> _Audited:
        return _Audited(Damage(name, what, shard, tuple(images)), [], {})

    try:
        mapped = MappedShard(path, info, shard, None if manifest is None else manifest.shards[shard])
        header = ShardHeader.from_file(path)
    except InputError as error:
        return damaged(str(error))
    keys = {image.row: image.path for image in header.images}
    records = bad_records(info, mapped)
    changed = [tensor for tensor in sorted(mapped.tensors) if not _intact(mapped, tensor)]
    if changed or records:
        first = records[min(records)] if records else ""
        what = f"{', '.join(changed)} differ from their checksums" if changed else first
        return damaged(what, [keys[row] for row in sorted(records)])
    return _Audited(None, header.images, {name: mapped.tensors[name].copy() for name in SUMS})


def _intact(shard: MappedShard, tensor: str) -> bool:
    return checksum(as_bytes(shard.tensors[tensor])) == shard.checksums[tensor]
