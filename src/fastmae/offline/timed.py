"""Tokenising for a comparison, which also tells how long it took."""

import time
from pathlib import Path
from typing import Any, TypedDict

from fastmae.config import TokenizeConfig
from fastmae.offline.tokenize import tokenize
from fastmae.outside.documents import read_json
from fastmae.runtime.durable import write_json


class _Record(TypedDict):
    seconds: float
    done: bool


def tokenize_timed(config: TokenizeConfig, record: Path) -> tuple[dict[str, Any], float]:
    """Make a store, or find it made; what `tokenize` returns, and the seconds that making it took.

    Args:
        config: the options.
        record: a JSON file beside the store. It adds up the calls that were needed, of which each but the last one was
            interrupted; the time of a killed one is lost.
    """
    known: _Record = {"seconds": 0.0, "done": False}
    if record.exists():
        known = read_json(record, _Record, way_out="delete it; only the time that tokenising took is lost")
    start, done = time.monotonic(), False
    try:
        result = tokenize(config)
        done = True
    finally:
        if not known["done"]:
            known = {"seconds": round(known["seconds"] + time.monotonic() - start, 2), "done": done}
            write_json(record, known)
    return result, known["seconds"]
