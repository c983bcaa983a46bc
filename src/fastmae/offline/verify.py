"""`fastmae verify`: re-read a token store, name what is damaged, and with `--repair` make just that again from the images."""

import json
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from fastmae.config import VerifyConfig
from fastmae.errors import FailedCheckError, InputError, first_line
from fastmae.images.image_list import ImageList, new_entries, write_list
from fastmae.images.middle import MiddleImage
from fastmae.images.reading import Skipped
from fastmae.images.sources import Source, open_source
from fastmae.offline.fill import LoaderOptions, MiddleImages, build_shards
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_whole
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import worker_count
from fastmae.teachers.factory import teacher_of_store
from fastmae.tokens.audit import Damage, audit, description_of
from fastmae.tokens.codec import learns, load_codec
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    LISTS_FOLDER,
    MANIFEST_FILE,
    SCALES_FILE,
    STORE_FILE,
    ShardHeader,
    StoreInfo,
    checksum,
    list_name,
    shard_path,
)
from fastmae.tokens.manifest import Manifest, load_tensors, read_header, store_text
from fastmae.tokens.shard import MappedShard
from fastmae.tokens.writer import StoreWriter

SHOWN = 20
KINDS_WITH_PLACES = ("tar", "datasets")
"""Sources whose lists say where in them an image lies."""


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check every byte of a store; the command's JSON.

    Raises:
        FailedCheckError: something is damaged, and is not to be repaired or can't be.
    """
    if re.match(r"\w+:/", str(config.store)):
        raise InputError(f"{config.store}: a URL; verify reads a folder, so call it where the store's files are")
    damaged: list[dict[str, Any]] = []
    folders = _stores(config.store, config.repair, damaged)
    for folder in folders:
        info = description_of(folder)
        with Progress("verify", "shards", total=info.shards) as progress:
            found = list(audit(folder, partial(progress.advance, 1)))
        _name(folder, found)
        if found and config.repair:
            _repair(config, folder, found)
            found = list(audit(folder))
            print(f"{folder}: {'repaired' if not found else 'still damaged'}")
        damaged += [{"file": str(folder / d.file), "what": d.what, "images": list(d.images)} for d in found]
        if [part.images_sha256 for part in info.parts] != [
            part.images_sha256 for part in description_of(folders[0]).parts
        ]:
            what = f"holds other images than {folders[0]}; give the same `fastmae tokenize` again"
            damaged.append({"file": str(folder / STORE_FILE), "what": what, "images": []})
    result = {"ok": not damaged, "damaged": damaged}
    if damaged:
        way_out = "; the rest is sound" if config.repair else "; --repair makes them again"
        raise FailedCheckError(
            f"{config.store}: {len(damaged)} of its files are damaged (first: {damaged[0]['file']}){way_out}", result
        )
    print(f"{config.store}: every byte is as it was written")
    return result


def _stores(folder: Path, repair: bool, damaged: list[dict[str, Any]]) -> list[Path]:
    """The stores in a folder: itself, or one a middle size, which scales.json lists; where it does not, that is damage."""
    file = folder / SCALES_FILE
    sizes = sorted(
        int(store.name) for store in folder.glob("*/") if store.name.isdigit() and (store / STORE_FILE).exists()
    )
    if not file.exists() and not sizes:
        return [folder]
    text = f"{json.dumps({'sizes': sizes}, indent=2)}\n"
    if not file.exists() or file.read_bytes() != text.encode():
        print(f"{file}: does not list the sizes that are there")
        if repair:
            write_whole(file, lambda aside: aside.write_text(text, encoding="utf-8"))
        else:
            damaged.append({"file": str(file), "what": "does not list the sizes that are there", "images": []})
    return [folder / str(size) for size in sizes]


def _name(folder: Path, found: list[Damage]) -> None:
    for damage in found[:SHOWN]:
        images = f"; images {', '.join(damage.images)}" if damage.images else ""
        print(f"{folder / damage.file}: {damage.what.removeprefix(f'{folder / damage.file}: ')}{images}")
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more")


def _repair(config: VerifyConfig, folder: Path, found: list[Damage]) -> None:
    """Make again what is damaged, smallest first: descriptions, codebooks, lists, shards, and what follows from them.

    Raises:
        InputError: something that can't be made again.
    """
    files = {damage.file for damage in found}
    info = description_of(folder)
    if STORE_FILE in files:
        write_whole(folder / STORE_FILE, lambda aside: aside.write_text(store_text(info), encoding="utf-8"))
    for damaged, sound in ((CODEBOOKS_FILE, CODEBOOKS_COPY), (CODEBOOKS_COPY, CODEBOOKS_FILE)):
        if damaged in files and sound in files:
            raise InputError(
                f"{folder}: {damaged} and its copy are both damaged, and no token can be read without; tokenize again"
            )
        if damaged in files:
            write_whole(folder / damaged, partial(shutil.copyfile, folder / sound))
    damaged_shards = {damage.shard for damage in found if damage.shard is not None}
    shards = sorted(damaged_shards | {shard for shard in range(info.shards) if not shard_path(folder, shard).exists()})
    parts = {info.part_of(shard)[0] for shard in shards}
    for part, described in enumerate(info.parts):
        moves = part in parts and described.kind in KINDS_WITH_PLACES  # a repacked archive has the same keys elsewhere
        if list_name(part) in files or not (folder / list_name(part)).exists() or moves:
            _list_again(folder, info, part)
    writer = StoreWriter(folder, info)
    if shards:
        _rebuild(config, writer, shards, {part: open_source(Path(info.parts[part].source)) for part in sorted(parts)})
    writer.finish()


def _list_again(folder: Path, info: StoreInfo, part: int) -> None:
    file = folder / list_name(part)
    (folder / LISTS_FOLDER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as aside:
        entries = open_source(Path(info.parts[part].source)).entries()
        if part:
            entries = new_entries(
                entries, [ImageList(folder / list_name(earlier)) for earlier in range(part)], Path(aside)
            )
        made = write_list(entries, Path(aside) / "images.list")
        if (made.images, made.sha256) != (info.parts[part].images, info.parts[part].images_sha256):
            where = info.parts[part].source
            raise InputError(
                f"{file}: can't be made again, since {where} holds other images by now; bring them or the file back"
            )
        write_whole(file, partial(shutil.copyfile, Path(aside) / "images.list"))


def _rebuild(config: VerifyConfig, writer: StoreWriter, shards: list[int], sources: dict[int, Source]) -> None:
    """Run the teacher over the images of some shards again, and say whether the same bytes came out."""
    info, folder = writer.info, writer.folder
    teacher = teacher_of_store(info.teacher, info.middle_size, info.grid).to(own_device(config.device))
    codec = load_codec(info.codec, info.token_dim, load_tensors(folder / CODEBOOKS_FILE) if learns(info.codec) else {})
    images = MiddleImages.of_store(folder, info, sources)
    _check_unchanged(images, folder, shards, config)
    count = sum(len(info.part_of(shard)[1]) for shard in shards)
    with Progress("repair", "images", total=count) as progress:
        build_shards(writer, codec, shards, images, teacher, LoaderOptions(config.batch_size, config.workers), progress)
    try:
        listed = Manifest.read(folder / MANIFEST_FILE).shards
    except InputError as error:
        print(f"{folder}: {len(shards)} shards made again ({first_line(error)})")
        return
    there = [(shard_path(folder, shard), listed[shard]) for shard in shards]
    same = sum((path.stat().st_size, checksum(read_header(path))) == entry for path, entry in there)
    print(f"{folder}: {len(shards)} shards made again, {same} of them to the same bytes")


def _check_unchanged(images: MiddleImages, folder: Path, shards: list[int], config: VerifyConfig) -> None:
    """The images of the shards that are made again are those that were there: a shard keeps a checksum of each one's pixels.

    Raises:
        InputError: some have changed, so what is still sound would be lost.
    """
    changed = []
    for shard in shards:
        listed = _listed_shard(folder, shard)
        if listed is None:
            continue
        mapped, rows = listed
        batches = list(images.batches_of(shard, config.batch_size))
        for batch in images.load(batches, min(worker_count(config.workers), len(batches))):
            changed += [key for key, image in batch if _pixels_checksum(image) != mapped.pixels_checksum(rows[key])]
    if changed:
        named = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise InputError(
            f"{folder}: {len(changed)} images are not what they were ({named}); bring them back, or tokenize again"
        )


def _listed_shard(folder: Path, shard: int) -> tuple[MappedShard, dict[str, int]] | None:
    """A damaged shard and its images' rows, where its header is sound and nothing but records is damaged."""
    try:
        mapped = MappedShard(shard_path(folder, shard), *Manifest.read(folder / MANIFEST_FILE).shards[shard])
    except InputError:
        return None
    return mapped, {image.path: image.row for image in ShardHeader.from_file(mapped.file).images}


def _pixels_checksum(image: MiddleImage | Skipped) -> int | None:
    if isinstance(image, Skipped):
        return None
    kept = image.pixels if image.jpeg is None else image.jpeg
    return xxhash.xxh3_64_intdigest(kept.contiguous().numpy().tobytes())
