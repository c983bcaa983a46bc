"""fastmae: masked image modelling with a teacher that ran once (FastMAE, Guo et al., 2025)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TokenStore", "View", "load_encoder"]

if TYPE_CHECKING:
    from fastmae.runs.encoder import load_encoder
    from fastmae.tokens import TokenStore, View

_HOMES = {"TokenStore": "fastmae.tokens", "View": "fastmae.tokens", "load_encoder": "fastmae.runs.encoder"}


def __getattr__(name: str) -> Any:
    # Imported at first use: torch and timm take seconds, and `fastmae --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
