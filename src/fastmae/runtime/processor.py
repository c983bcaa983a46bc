"""What the CPU is called, what it can do, and how much of it a container gets."""

import math
import platform
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the CPU: microseconds in a period, or `max`, and the period (cgroups 2)."""
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86 and of ARM."""


def cpu_model() -> str:
    """The CPU's name."""
    return _entry("model name") or platform.processor() or platform.machine()


def has_avx512() -> bool:
    """Whether torch uses AVX-512."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def has_bf16() -> bool | None:
    """Whether the CPU multiplies bfloat16 natively; None where the system does not say."""
    flags = _entry("flags") or _entry("Features")
    return bool(BF16_FLAGS & {*flags.split()}) if flags else None


def core_quota() -> float:
    """Cores that a container may keep busy; infinite where there is no limit."""
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file; or the quota is the word `max`
        return math.inf


def _entry(name: str) -> str:
    """The first line of this name in the system's description of its CPUs; empty if there is none."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
