"""`fastmae verify`: re-read a token store, name what is damaged, and with `--repair` make just that again from the images."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from fastmae.config import VerifyConfig
from fastmae.device import own_device
from fastmae.durable import write_whole
from fastmae.errors import FailedCheckError, InputError, first_line
from fastmae.images.listing import ImageList, new_entries, write_list
from fastmae.images.sources import Source, open_source
from fastmae.offline import Loading, StoreImages, fill
from fastmae.progress import Progress
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
    StoreInfo,
    checksum,
    list_name,
    shard_path,
)
from fastmae.tokens.manifest import Manifest, read_header, store_text
from fastmae.tokens.writer import StoreWriter

SHOWN = 20


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check every byte of a store; the command's JSON.

    Raises:
        FailedCheckError: something is damaged, and is not to be repaired or can't be.
    """
    damaged: list[dict[str, Any]] = []
    for folder in _stores(config.store):
        info = description_of(folder)
        with Progress("verify", "shards", total=info.shards) as progress:
            found = list(audit(folder, partial(progress.advance, 1)))
        _name(folder, found)
        if found and config.repair:
            _repair(config, folder, found)
            found = list(audit(folder))
            print(f"{folder}: {'repaired' if not found else 'still damaged'}")
        damaged += [{"file": str(folder / d.file), "what": d.what, "images": list(d.images)} for d in found]
    result = {"ok": not damaged, "damaged": damaged}
    if damaged:
        way_out = "; the rest is sound" if config.repair else "; --repair makes it again from the images"
        raise FailedCheckError(f"{config.store}: {len(damaged)} of its files are damaged (first: {damaged[0]['file']}){way_out}", result)
    print(f"{config.store}: every byte is as it was written")
    return result


def _stores(folder: Path) -> list[Path]:
    """The stores in a folder: itself, or one a middle size."""
    file = folder / SCALES_FILE
    if not file.exists():
        return [folder]
    found = sorted((store for store in folder.iterdir() if store.is_dir() and store.name.isdigit()), key=lambda store: int(store.name))
    text = f"{json.dumps({'sizes': [int(store.name) for store in found]}, indent=2)}\n"
    if not found or file.read_text(encoding="utf-8", errors="replace") != text:
        raise FailedCheckError(
            f"{file}: does not list the sizes that are there; run the same `fastmae tokenize` again",
            {"ok": False, "damaged": [{"file": str(file), "what": "does not list the sizes that are there", "images": []}]},
        )
    return found


def _name(folder: Path, found: list[Damage]) -> None:
    for damage in found[:SHOWN]:
        images = f"; images {', '.join(damage.images)}" if damage.images else ""
        print(f"{folder / damage.file}: {damage.what}{images}")
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
            raise InputError(f"{folder}: {damaged} and its copy are both damaged, and no token can be read without; tokenize again")
        if damaged in files:
            write_whole(folder / damaged, partial(shutil.copyfile, folder / sound))
    sources = [open_source(Path(part.source)) for part in info.parts]
    for part in range(len(info.parts)):
        if list_name(part) in files or not (folder / list_name(part)).exists():
            _list_again(folder, info, part, sources)
    shards = [damage.shard for damage in found if damage.shard is not None]
    writer = StoreWriter(folder, info)
    if shards:
        _rebuild(config, writer, shards, sources)
    writer.finish()


def _list_again(folder: Path, info: StoreInfo, part: int, sources: list[Source]) -> None:
    file = folder / list_name(part)
    (folder / LISTS_FOLDER).mkdir(exist_ok=True)
    entries = sources[part].entries()
    if part:
        entries = new_entries(entries, [ImageList(folder / list_name(earlier)) for earlier in range(part)], folder / LISTS_FOLDER)
    made = write_list(entries, file)
    if (made.images, made.sha256) != (info.parts[part].images, info.parts[part].images_sha256):
        file.unlink()
        where = info.parts[part].source
        raise InputError(f"{file}: can't be made again, since {where} holds other images by now; bring them or the file back")


def _rebuild(config: VerifyConfig, writer: StoreWriter, shards: list[int], sources: list[Source]) -> None:
    """Run the teacher over the images of some shards again, and say whether the same bytes came out."""
    info, folder = writer.info, writer.folder
    teacher = teacher_of_store(info.teacher, info.middle_size, info.grid).to(own_device(config.device))
    codec = load_codec(info.codec, info.token_dim, load_file(folder / CODEBOOKS_FILE) if learns(info.codec) else {})
    images = StoreImages.of_store(folder, info, sources)
    count = sum(len(info.part_of(shard)[1]) for shard in shards)
    with Progress("repair", "images", total=count) as progress:
        fill(writer, codec, shards, images, teacher, Loading(config.batch_size, config.workers), progress)
    try:
        listed = Manifest.read(folder / MANIFEST_FILE).shards
    except InputError as error:
        print(f"{folder}: {len(shards)} shards made again ({first_line(error)})")
        return
    there = [(shard_path(folder, shard), listed[shard]) for shard in shards]
    same = sum((path.stat().st_size, checksum(read_header(path))) == entry for path, entry in there)
    print(f"{folder}: {len(shards)} shards made again, {same} of them to the same bytes")
