"""`fastmae verify`: check a whole token store, its bytes and what they mean. `--repair` is in `repair`."""

import contextlib
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastmae.config import VerifyConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.offline.remote_copy import remote_copy
from fastmae.offline.repair import repair
from fastmae.outside.regular_file import read_bounded
from fastmae.runtime.durable import write_json
from fastmae.runtime.ownership import owned
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.tokens.audit import Bring, Damage, audit, description_of, here
from fastmae.tokens.files import is_url
from fastmae.tokens.format import LARGEST_SCALES, MANIFEST_FILE, SCALES_FILE, STORE_FILE
from fastmae.tokens.reader import open_scales

log = logging.getLogger(__name__)

SHOWN_DAMAGE = 20
REPAIRABLE = "--repair makes them again"
REPAIRED_ELSEWHERE = "repair the store where it was made and upload it again"


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check a whole store, and with `--repair` restore what is damaged; returns the command's JSON.

    Every byte is compared with its checksum, every token and every middle image is looked at, and the files with each
    other. What passes can be trained on. A store behind a URL is fetched for it, shard by shard.

    Raises:
        FailedCheckError: something is damaged, and still is after a repair.
        InputError: no store, damage that can't be repaired, or another process that writes the store.
    """
    if is_url(config.store):
        return _verify_remote(config)
    folder = Path(config.store)
    with owned(folder, "verify --repair") if config.repair else contextlib.nullcontext():
        return _verify(config, folder, lambda _: here)


def _verify_remote(config: VerifyConfig) -> dict[str, Any]:
    """Check a store behind a URL. Messages name the URL instead of the copy on this machine."""
    if config.repair:
        way_out = (
            f"repair the store where it was made; `fastmae upload STORE {config.store}` then sends what has changed"
        )
        raise InputError(f"{config.store}: --repair takes a folder; {way_out}")
    with remote_copy(config.store) as copy:
        try:
            return _verify(config, copy.folder, copy.bring, copy.named)
        except FailedCheckError as error:
            damaged = [
                {**entry, "file": copy.named(entry["file"]), "what": copy.named(entry["what"])}
                for entry in (error.result or {})["damaged"]
            ]
            message = copy.named(str(error)).replace(REPAIRABLE, REPAIRED_ELSEWHERE)
            raise FailedCheckError(message, {"ok": False, "damaged": damaged}) from error
        except InputError as error:
            raise InputError(copy.named(str(error))) from error


def _verify(
    config: VerifyConfig, whole: Path, bring: Callable[[Path], Bring], named: Callable[[str], str] = str
) -> dict[str, Any]:
    """Check a store in a folder.

    Args:
        config: options of `verify`.
        whole: the folder, with the stores of all middle sizes.
        bring: folder of one middle size -> what brings its shards (`audit`).
        named: a message that names the folder -> the same with the store's own name.
    """
    sizes = _sizes(whole)
    folders = [whole / str(size) for size in sizes] or [whole]
    damaged = _check_scales(config, whole, sizes) if sizes else []
    first_lists = [part.images_sha256 for part in description_of(folders[0]).parts]
    for folder in folders:
        damaged += _check_store(config, folder, bring(folder), named)
        if [part.images_sha256 for part in description_of(folder).parts] != first_lists:
            what = f"holds other images than {folders[0]}; give the same `fastmae tokenize` again"
            damaged.append(_as_json(folder, Damage(STORE_FILE, what)))
    result = {"ok": not damaged, "damaged": damaged}
    if damaged:
        way_out = "the rest is sound" if config.repair else REPAIRABLE
        file, what = damaged[0]["file"], damaged[0]["what"]
        first = f"first: {file}: {what.removeprefix(f'{file}: ').split(';')[0]}"
        raise FailedCheckError(f"{whole}: {counted(len(damaged), 'damaged file')} ({first}); {way_out}", result)
    try:
        open_scales(whole)  # as training does: the stores of several sizes must also belong together
    except InputError as error:
        damaged = [_as_json(whole, Damage("", str(error)))]
        raise FailedCheckError(str(error), {"ok": False, "damaged": damaged}) from error
    log.info(named(f"{whole}: every byte is as it was written, and every image and its tokens can be used"))
    return result


def _sizes(folder: Path) -> list[int]:
    """Middle sizes of the stores in a folder, also of a store that has lost its description or its manifest."""
    stores = [store for store in folder.glob("*/") if re.fullmatch("[1-9][0-9]{0,4}", store.name)]
    descriptions = (STORE_FILE, MANIFEST_FILE)
    return sorted(int(store.name) for store in stores if any((store / name).exists() for name in descriptions))


def _check_scales(config: VerifyConfig, whole: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """Check the list of a store's middle sizes; a repair writes it again. Returns the damage that is left."""
    file = whole / SCALES_FILE
    expected = json.dumps({"sizes": sizes}, indent=2) + "\n"
    damage = Damage(SCALES_FILE, "does not list the sizes that are there")
    try:
        if read_bounded(file, LARGEST_SCALES) == expected.encode():
            return []
    except (FileNotFoundError, InputError) as error:
        damage = Damage(SCALES_FILE, str(error))
    log.info(f"{file}: {damage.what}")
    if config.repair:
        write_json(file, {"sizes": sizes})
        return []
    return [_as_json(whole, damage)]


def _check_store(config: VerifyConfig, folder: Path, bring: Bring, named: Callable[[str], str]) -> list[dict[str, Any]]:
    """Check the store of one middle size, and repair it if asked to. Returns the damage that is left."""
    damage = _audited(folder, bring)
    if damage:
        log.info(named(_as_lines(folder, damage)))
    if damage and config.repair:
        repair(config, folder, damage)
        damage = _audited(folder, bring)
        log.info(f"{folder}: {'still damaged' if damage else 'repaired'}")
    return [_as_json(folder, damaged) for damaged in damage]


def _audited(folder: Path, bring: Bring) -> list[Damage]:
    with Progress("verify", "shards", total=description_of(folder).shards) as progress:
        return list(audit(folder, partial(progress.advance, 1), bring))


def _as_json(folder: Path, damaged: Damage) -> dict[str, Any]:
    return {"file": str(folder / damaged.file), "what": damaged.what, "images": list(damaged.images)}


def _as_lines(folder: Path, damage: list[Damage]) -> str:
    """A line for each damaged file: what is wrong with it, and the images whose records are damaged."""
    lines = []
    for damaged in damage[:SHOWN_DAMAGE]:
        file = folder / damaged.file
        images = f"; images {', '.join(damaged.images)}" if damaged.images else ""
        lines.append(f"{file}: {damaged.what.removeprefix(f'{file}: ')}{images}")
    if len(damage) > SHOWN_DAMAGE:
        lines.append(f"... and {len(damage) - SHOWN_DAMAGE} more")
    return "\n".join(lines)
