"""`fastmae inspect`: what a store holds. Also the summary with which `tokenize` ends."""

import logging
from pathlib import Path
from typing import Any

from fastmae.config import InspectConfig
from fastmae.errors import InputError
from fastmae.offline.contact_sheet import contact_sheet_png, entries
from fastmae.offline.quality import as_json, as_lines, look_at
from fastmae.runtime.durable import write_whole
from fastmae.runtime.wording import counted
from fastmae.tokens import TokenStore
from fastmae.tokens.files import url_of
from fastmae.tokens.reader import open_scales

log = logging.getLogger(__name__)


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Describe a store; returns the command's JSON.

    Raises:
        InputError: no finished store, or one behind a URL.
    """
    refuse_url(config.store, "inspect")
    stores = open_scales(config.store)
    info = stores[0].info
    summaries = [store_summary(store, images_per_second=None) for store in stores]
    summary = {
        **(summaries[0] if len(stores) == 1 else summary_over_scales(summaries)),
        "teacher": info.teacher,
        "codec": info.codec,
        "flips": info.flips,
        "pixels": info.pixels,
        "patch_size": info.patch_size,
        "channels": info.channels,
        "value_range": info.value_range,
        "middle_size": info.middle_size if len(stores) == 1 else [store.info.middle_size for store in stores],
        "shards": sum(store.info.shards for store in stores),
    }
    log.info("\n".join(f"{name}: {_as_text(name, value)}" for name, value in summary.items() if value is not None))
    if config.quality:
        summary["quality"] = _inspect_quality(config, stores[0])
    return summary


def _inspect_quality(config: InspectConfig, store: TokenStore) -> dict[str, Any]:
    """Say what looks wrong in a store, and draw it; returns the counts and the sheet's path."""
    sheet = config.out or Path(f"{config.store.absolute()}-quality.png")
    if sheet.resolve().is_relative_to(config.store.resolve()):
        raise InputError(f"--out {sheet}: is inside the store; give a path outside {config.store}")
    quality = look_at(store)
    lines, drawn = as_lines(quality, store), entries(quality, store)
    for line in lines:
        log.warning(line)
    if drawn:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        write_whole(sheet, lambda aside: aside.write_bytes(contact_sheet_png(drawn)))
        log.info(f"{sheet}: {counted(len(drawn), 'suspicious image')}")
    if not lines:
        log.info(f"nothing looks wrong; {counted(quality.looked_at, 'image')} looked at")
    return {**as_json(quality, store), "sheet": str(sheet) if drawn else None}


def refuse_url(store: Path, command: str) -> None:
    """Refuse a URL where a command reads the files of a folder.

    Raises:
        InputError: a URL. As a `Path`, it has one slash after the colon.
    """
    if url := url_of(store):
        raise InputError(f"{url}: a URL; {command} reads a folder, so call it where the store's files are")


def store_summary(store: TokenStore, images_per_second: float | None) -> dict[str, Any]:
    """Images, size and grid of a store of one middle size.

    Args:
        store: the finished store.
        images_per_second: speed at which it was built, where this is known.
    """
    num_bytes = store.manifest.total_bytes()
    return {
        "images": len(store),
        "skipped": store.skipped,
        "grid": store.grid,
        "token_dim": store.token_dim,
        "codec": store.info.codec,
        "bytes": num_bytes,
        "bytes_per_image": round(num_bytes / len(store)),
        "images_per_second": images_per_second,
    }


def summary_over_scales(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One summary of a store with several middle sizes: the sum of the bytes, and the grid of each size."""
    speeds = [summary["images_per_second"] for summary in summaries]
    return {
        **summaries[0],
        "grid": [summary["grid"] for summary in summaries],
        "bytes": sum(summary["bytes"] for summary in summaries),
        "bytes_per_image": sum(summary["bytes_per_image"] for summary in summaries),
        "images_per_second": None if None in speeds else min(speeds),
    }


def _as_text(name: str, value: Any) -> str:
    if name.startswith("bytes"):
        return f"{value:,} ({value / 1e6:.1f} MB)" if value >= 1e5 else f"{value:,} ({value / 1e3:.1f} kB)"
    if not isinstance(value, dict):
        return str(value)
    shown = {key: f"{entry[:12]}..." if key.endswith("sha256") else entry for key, entry in value.items()}
    return ", ".join(f"{key} {entry}" for key, entry in shown.items() if entry not in (None, ""))
