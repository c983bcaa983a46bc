"""fastmae: masked image modelling with a teacher that ran once (FastMAE, Guo et al., 2025)."""

import importlib

TYPE_CHECKING = False
"""As typing has it, whose import takes longer than all of this file."""
if TYPE_CHECKING:
    from fastmae.api import (
        ablate,
        bench_accuracy,
        bench_loader,
        bench_step,
        bench_store,
        demo,
        detect,
        doctor,
        export,
        features,
        finetune,
        inspect,
        knn,
        linear,
        pretrain,
        recipes,
        report,
        segment,
        tokenize,
        upload,
        verify,
    )
    from fastmae.errors import FailedCheckError, InputError, InterruptedRunError
    from fastmae.runs.encoder import load_encoder
    from fastmae.tokens import TokenStore, View

__version__ = "0.1.0"
__all__ = [
    "FailedCheckError",
    "InputError",
    "InterruptedRunError",
    "TokenStore",
    "View",
    "ablate",
    "bench_accuracy",
    "bench_loader",
    "bench_step",
    "bench_store",
    "demo",
    "detect",
    "doctor",
    "export",
    "features",
    "finetune",
    "inspect",
    "knn",
    "linear",
    "load_encoder",
    "pretrain",
    "recipes",
    "report",
    "segment",
    "tokenize",
    "upload",
    "verify",
]
_HOMES = {
    "FailedCheckError": "fastmae.errors",
    "InputError": "fastmae.errors",
    "InterruptedRunError": "fastmae.errors",
    "TokenStore": "fastmae.tokens",
    "View": "fastmae.tokens",
    "load_encoder": "fastmae.runs.encoder",
}
"""Where a name lives, if not in `fastmae.api`."""


def __getattr__(name: str) -> object:
    # Imported at first use: torch and timm take seconds, and Ctrl-C may come at any moment of the command's start.
    if name not in __all__:
        raise AttributeError(f"module 'fastmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "fastmae.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
