"""The machine and its software, and whether all of fastmae can be imported there."""

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastmae.bench.table import machine
from gpu_check.report import Report
from gpu_check.setting import Setting

PACKAGES = ("torchvision", "timm", "transformers", "lightning-fabric", "faiss-cpu", "numpy", "pillow", "simplejpeg")
SHARED_MEMORY = Path("/dev/shm")


def describe(device: str) -> dict[str, str]:
    """The machine: card, cores, memory, versions."""
    rows = {"card": _card() if device != "cpu" else "none: toy sizes on the CPU"}
    rows |= machine()
    if SHARED_MEMORY.exists():
        rows["shared memory"] = f"{shutil.disk_usage(SHARED_MEMORY).free / 1e9:.0f} GB free"
    return rows | {name: _version(name) for name in PACKAGES}


def imports(setting: Setting, report: Report) -> None:
    """All modules can be imported with the versions that are installed."""
    broken = setting.commands.imports()
    seen = "; ".join(f"{name}: {why}" for name, why in broken.items())
    report.check("all modules can be imported", not broken, "no error", seen or "no error")


def _card() -> str:
    card = torch.cuda.get_device_properties(0)
    memory, capability = card.total_memory / 2**30, f"{card.major}.{card.minor}"
    cudnn = torch.backends.cudnn.version()
    return f"{card.name}, {memory:.0f} GiB, capability {capability}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
