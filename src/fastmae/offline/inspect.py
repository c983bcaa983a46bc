"""`fastmae inspect`: what a store holds; and the summary that `tokenize` ends with."""

import re
from typing import Any

from fastmae.config import InspectConfig
from fastmae.errors import InputError
from fastmae.tokens import TokenStore
from fastmae.tokens.reader import open_scales


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Say what a store holds; the command's JSON."""
    if re.match(r"\w+:/", str(config.store)):
        raise InputError(f"{config.store}: a URL; inspect reads a folder, so call it where the store's files are")
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
        "middle_size": info.middle_size if len(stores) == 1 else [store.info.middle_size for store in stores],
        "shards": sum(store.info.shards for store in stores),
    }
    for name, value in summary.items():
        if value is not None:
            print(f"{name:16} {_listed(value) if isinstance(value, dict) else value}")
    return summary


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ""))


def store_summary(store: TokenStore, images_per_second: float | None) -> dict[str, Any]:
    """Of a store of one middle size: images, bytes, grid."""
    size = store.manifest.total_bytes()
    return {
        "images": len(store),
        "skipped": store.skipped,
        "grid": store.grid,
        "token_dim": store.token_dim,
        "bytes": size,
        "bytes_per_image": round(size / len(store)),
        "images_per_second": images_per_second,
    }


def summary_over_scales(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One summary of a store of several sizes: bytes added up, the grid of each size."""
    first = summaries[0]
    rates = [summary["images_per_second"] for summary in summaries]
    return {
        **first,
        "grid": [summary["grid"] for summary in summaries],
        "bytes": sum(summary["bytes"] for summary in summaries),
        "bytes_per_image": sum(summary["bytes_per_image"] for summary in summaries),
        "images_per_second": None if None in rates else min(rates),
    }
