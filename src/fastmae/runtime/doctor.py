"""`fastmae doctor`: the machine and the installation as fastmae sees them, and what to change.

Nothing here may fail, whatever the machine is like: what can't be asked is left out, and said.
"""

import importlib
import logging
import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastmae.config import DoctorConfig
from fastmae.errors import first_line
from fastmae.runtime import memory, packages, processor
from fastmae.runtime.device import cores, device_count, device_name, free_bytes, resolve_device, supports_bf16
from fastmae.runtime.wording import counted

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

PROBLEM, ADVICE, INFORMATION = "problem", "advice", "information"
NVIDIA = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
"""There where the driver of NVIDIA's GPUs is loaded."""
LEAST_SHARED, LEAST_MEMORY, LEAST_DISK = 1e9, 4e9, 10e9
LEAST_GPU_MEMORY = 8e9
LEAST_FREE_SHARE = 0.5
"""Of a GPU's memory; less means that another program uses it."""
LEAST_OPEN_FILES = 4096
OTHER_TORCHVISION = "install the torchvision that belongs to this torch, from where torch came"
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """Something to know about the machine.

    Attributes:
        level: 'problem', 'advice' or 'information'; see `Examination`.
        what: what was found.
        way_out: what to do; '' for nothing.
    """

    level: str
    what: str
    way_out: str = ""


class Examination:
    """What was found so far."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def problem(self, what: str, way_out: str) -> None:
        """Something will not work."""
        self.findings.append(Finding(PROBLEM, what, way_out))

    def advice(self, what: str, way_out: str) -> None:
        """It works, but less well than it could."""
        self.findings.append(Finding(ADVICE, what, way_out))

    def information(self, what: str, way_out: str = "") -> None:
        """Good to know."""
        self.findings.append(Finding(INFORMATION, what, way_out))

    def ask(self, what: str, question: Callable[[], Answer], otherwise: Answer) -> Answer:
        """The answer to a question about the machine; another answer, and a finding, where it can't be asked."""
        try:
            return question()
        except Exception as error:  # drivers and libraries raise anything
            self.information(f"{what}: can't be told ({type(error).__name__}: {first_line(error)})")
            return otherwise


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Look at the machine and the installation; the command's JSON."""
    seen = Examination()
    parts: dict[str, Callable[[Examination], Any]] = {
        "versions": _versions,
        "cpu": _cpu,
        "memory": _memory,
        "open_files": _open_files,
        "disk": _disk,
        "devices": _devices,
        "extras": _extras,
    }
    facts = {name: seen.ask(name, partial(look, seen), None) for name, look in parts.items()}
    if config.device != "auto":
        _check_device(seen, config.device)
    findings = sorted(seen.findings, key=lambda finding: (PROBLEM, ADVICE, INFORMATION).index(finding.level))
    log.info("\n".join([*_as_lines(facts), "", *_to_do(findings)]))
    return {
        "ok": all(finding.level != PROBLEM for finding in findings),
        **facts,
        "findings": [asdict(finding) for finding in findings],
    }


def _versions(seen: Examination) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    found |= packages.versions()
    for requirement in packages.unmet():
        has = packages.version_of(requirement.name)
        what = f"{requirement.name} {has} is installed" if has else f"{requirement.name} is not installed"
        wanted = f"{requirement.name}{requirement.specifier}"
        seen.problem(f"{what}, and fastmae needs {wanted}", f"pip install '{wanted}'")
    for requirement in packages.unmet("torchvision"):
        if requirement.name == "torch":
            needed = f"needs torch{requirement.specifier}, and {found['torch']} is installed"
            seen.problem(f"torchvision {found['torchvision']} {needed}", OTHER_TORCHVISION)
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # compiled for another torch, it fails in its own way
        seen.problem(f"torchvision can't be imported ({first_line(error)})", OTHER_TORCHVISION)
    return found


def _cpu(seen: Examination) -> dict[str, Any]:
    own, threads, quota = cores(), torch.get_num_threads(), processor.core_quota()
    facts = {
        "model": processor.cpu_model(),
        "cores": own,
        "threads": threads,
        "avx512": processor.has_avx512(),
        "bf16": processor.has_bf16(),
    }
    if quota < min(own, threads):
        fair = max(1, round(quota))
        seen.advice(
            f"the container may keep {quota:g} cores busy, and torch starts {threads} threads, which then wait",
            f"set OMP_NUM_THREADS={fair}, and give --workers {max(1, fair - 1)}",
        )
    elif threads < own and "OMP_NUM_THREADS" in os.environ:
        seen.information(
            f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}: torch computes on {threads} of {own} cores",
            "unset it if no other program needs them",
        )
    if facts["bf16"]:
        seen.information("this CPU computes in bf16", "--precision bf16-mixed may be faster than auto, which is fp32")
    elif facts["bf16"] is False:
        seen.information("this CPU emulates bf16, which is slow", "leave --precision at auto, which is fp32 here")
    return facts


def _memory(seen: Examination) -> dict[str, Any]:
    available = memory.available()
    shared = seen.ask("/dev/shm", lambda: shutil.disk_usage(memory.SHARED_FOLDER).total, None)
    if available is not None and available < LEAST_MEMORY:
        seen.advice(
            f"{available / GB:.1f} GB of memory are free",
            "close other programs, or give --micro-batch and fewer --workers",
        )
    if shared is not None and shared < LEAST_SHARED:
        slow = "loading goes through pipes, which takes longer"
        few = "pretrain starts fewer loading workers"
        seen.advice(
            f"/dev/shm holds {shared / 1e6:.0f} MB: {slow if memory.inherits_memory() else few}",
            "start the container with docker run --shm-size 8g, or --ipc host",
        )
    return {"total": memory.total(), "available": available, "shared": shared}


def _open_files(seen: Examination) -> int | None:
    limit = memory.most_handles()
    if limit < LEAST_OPEN_FILES:
        seen.advice(
            f"a process may open {limit:.0f} files, which limits the loading workers",
            f"ulimit -n {16 * LEAST_OPEN_FILES}, or docker run --ulimit nofile={16 * LEAST_OPEN_FILES}",
        )
    return None if math.isinf(limit) else int(limit)


def _disk(seen: Examination) -> dict[str, Any]:
    free = shutil.disk_usage(Path.cwd()).free
    if free < LEAST_DISK:
        seen.advice(
            f"{free / GB:.1f} GB are free in {Path.cwd()}: {free / 0.8e6:.0f} images in fp16 at 352 px",
            "free some, or tokenize with --codec pq38 --jpeg-quality 65, which takes a twentieth",
        )
    return {"folder": str(Path.cwd()), "free": free}


def _devices(seen: Examination) -> list[dict[str, Any]]:
    """The accelerators that torch can use. Each multiplies two small matrices."""
    built_for = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available() and any(path.exists() for path in NVIDIA):
        _no_cuda(seen)
    kinds = dict.fromkeys(["cuda", "mps", "xpu", *_other_accelerator()])
    found: list[dict[str, Any]] = []
    unknown: dict[str, Any] = {}
    for name in (f"{kind}:{number}" for kind in kinds for number in range(_count(seen, kind))):
        device = torch.device(name)
        problem = _cant_compute(device)
        if problem:
            way_out = "update the driver, or install the torch that is built for this device"
            seen.problem(f"{name} can't compute ({problem})", way_out)
        found.append({"name": name, **seen.ask(name, partial(_describe, seen, device), unknown)})
    if not found:
        cuda = f"built for CUDA {built_for}" if built_for else "built without CUDA"
        seen.information(f"torch finds no GPU (it is {cuda})", "--recipe visible_tiny_cpu is made for a CPU")
    return found


def _no_cuda(seen: Examination) -> None:
    """Why torch can't use the NVIDIA GPU that is there."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        seen.problem(f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU", "unset it, or set the number of a GPU")
    elif torch.version.cuda is None:
        way_out = "install the torch that is built for CUDA"
        seen.problem(f"there is an NVIDIA GPU, and torch {torch.__version__} is built without CUDA", way_out)
    else:
        why = "no device"
        try:
            torch.cuda.init()
        except Exception as error:  # says which driver it has found
            why = first_line(error)
        way_out = "update the driver, or install the torch that is built for an older CUDA"
        seen.problem(f"torch is built for CUDA {torch.version.cuda} and can't use the GPU ({why})", way_out)


def _describe(seen: Examination, device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": device_name(device), "bf16": supports_bf16(device)}
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    free = free_bytes(device)
    facts |= {
        "memory": properties.total_memory,
        "free": int(free),
        "capability": f"{properties.major}.{properties.minor}",
    }
    if not facts["bf16"]:
        seen.information(f"{device} has no bf16", "--precision auto takes 16-mixed there")
    if free < LEAST_FREE_SHARE * properties.total_memory:
        seen.advice(
            f"{device}: {free / GB:.1f} of {properties.total_memory / GB:.1f} GB are free, so another program uses it",
            "nvidia-smi shows which; stop it, or take another GPU with --device",
        )
    if properties.total_memory < LEAST_GPU_MEMORY:
        way_out = "give --micro-batch 32, or --checkpoint-activations"
        seen.advice(f"{device} has {properties.total_memory / GB:.1f} GB", way_out)
    return facts


def _extras(seen: Examination) -> dict[str, list[str]] | None:
    """Each extra, with the packages that it lacks."""
    lacking = {name: [str(one.name) for one in missing] for name, missing in packages.extras().items()}
    if not lacking:
        seen.information("fastmae runs without having been installed, so its extras are not known")
        return None
    missing = [name for name, without in lacking.items() if without]
    if missing:
        named = [name if [name] == lacking[name] else f"{name} ({', '.join(lacking[name])})" for name in missing]
        seen.information(
            f"extras that lack packages: {', '.join(named)}", "if you need one: pip install 'fastmae[NAME]'"
        )
    return lacking


def _check_device(seen: Examination, name: str) -> None:
    try:
        resolve_device(name)
    except ValueError as error:
        what, _, way_out = str(error).rpartition("; ")
        seen.problem(what, way_out)


def _count(seen: Examination, kind: str) -> int:
    return seen.ask(kind, lambda: device_count(kind), 0)


def _other_accelerator() -> list[str]:
    """The type of an accelerator that torch has besides those that it names itself."""
    current = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return [] if current is None else [current.type]


def _cant_compute(device: torch.device) -> str | None:
    try:
        ones = torch.ones(8, 8, device=device)
        return None if float((ones @ ones).sum().cpu()) == 512 else "a product of two matrices is wrong"
    except Exception as error:
        return first_line(error)


def _as_lines(facts: dict[str, Any]) -> list[str]:
    """The facts, a line for each kind."""
    versions, cpu, ram = facts["versions"] or {}, facts["cpu"] or {}, facts["memory"] or {}
    named = [f"{name} {version or 'missing'}" for name, version in versions.items() if name != "system"]
    asked = (("AVX-512", cpu.get("avx512")), ("bf16", cpu.get("bf16")))
    abilities = [f"{'' if there else 'no '}{text}" for text, there in asked if there is not None]
    size = [counted(cpu[name], name.removesuffix("s")) for name in ("cores", "threads") if name in cpu]
    lines = [
        ("versions", ", ".join(named)),
        ("system", versions.get("system")),
        ("CPU", ", ".join([str(cpu.get("model")), *size, *abilities])),
        (
            "memory",
            f"{_gb(ram.get('total'))}, {_gb(ram.get('available'))} available; /dev/shm {_gb(ram.get('shared'))}; "
            f"{facts['open_files'] or 'any number of'} open files",
        ),
        ("disk", f"{_gb((facts['disk'] or {}).get('free'))} free here"),
    ]
    for device in facts["devices"] or []:
        room = f", {_gb(device['memory'])}, {_gb(device['free'])} free" if "memory" in device else ""
        lines.append((device["name"], f"{device.get('model')}{room}{', bf16' if device.get('bf16') else ''}"))
    there = [name for name, missing in (facts["extras"] or {}).items() if not missing]
    lines.append(("extras", ", ".join(there) or "none"))
    return [f"{name:9} {text}" for name, text in lines]


def _to_do(findings: list[Finding]) -> list[str]:
    """The findings, a line each, and how they are to be taken."""
    serious = [finding for finding in findings if finding.level != INFORMATION]
    head = f"{len(serious)} to change:" if serious else "nothing to change"
    lines = [
        f"  {finding.level}: {finding.what}{f'; {finding.way_out}' if finding.way_out else ''}" for finding in findings
    ]
    return [head, *lines]


def _gb(size: float | None) -> str:
    return "?" if size is None else f"{size / GB:.1f} GB"
