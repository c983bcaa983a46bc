"""Tokenising for a comparison, which also tells how long it took."""

import json
import time
from pathlib import Path
from typing import Any

from fastmae.config import TokenizeConfig
from fastmae.offline.tokenize import tokenize
from fastmae.runtime.durable import write_json


def tokenize_timed(config: TokenizeConfig, record: Path) -> tuple[dict[str, Any], float]:
    """Make a store, or find it made; what `tokenize` returns, and the seconds that making it took.

    Args:
        config: the options.
        record: a JSON file beside the store. It adds up the calls that were needed, of which each but the last one was
            interrupted; the time of a killed one is lost.
    """
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"seconds": 0.0, "done": False}
    start, done = time.monotonic(), False
    try:
        result = tokenize(config)
        done = True
    finally:
        if not known["done"]:
            known = {"seconds": round(known["seconds"] + time.monotonic() - start, 2), "done": done}
            write_json(record, known)
    return result, known["seconds"]
