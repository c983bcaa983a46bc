"""Memory that worker processes share with this one: how much there is, and how it is taken. And how many open files."""

import contextlib
import math
import mmap
import multiprocessing
import os
import shutil
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SHARED_FOLDER = Path("/dev/shm")
"""Where Linux keeps named shared memory; a container's may be as small as 64 MB."""
PROC_MEMORY, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
OPEN_FILES = Path("/proc/self/fd")
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""A container's limit, what it uses, and which figure of memory.stat names the file cache in that (cgroups 2 and 1)."""


def inherits_memory() -> bool:
    """Whether new worker processes are forks of this one, which have its shared memory without being told of it."""
    return multiprocessing.get_start_method() == "fork"


def shared_memory(count: int) -> torch.Tensor:
    """Memory that worker processes and this one both read and write, uint8 [count]. It is taken when it is touched.

    A fork inherits an anonymous map, whose only limit is the machine's memory. A process that was started afresh can
    only open named memory, which on Linux lies in `SHARED_FOLDER`. Writing more than fits there ends in a bus error.
    """
    if inherits_memory():
        return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count))


def available_for_sharing() -> int | None:
    """Bytes that `shared_memory` can give now; None where the system doesn't say."""
    limits = [_free_of_machine(), _free_of_container()]
    if not inherits_memory() and SHARED_FOLDER.exists():
        limits.append(int(free_shared_folder()))
    return min((limit for limit in limits if limit is not None), default=None)


def available() -> int | None:
    """Bytes that this process can still have; None where the system doesn't say."""
    return min((limit for limit in (_free_of_machine(), _free_of_container()) if limit is not None), default=None)


def total() -> int | None:
    """Bytes of the machine's memory; None where the system doesn't say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def free_shared_folder() -> float:
    """Free bytes in `SHARED_FOLDER`; infinite where shared memory lies elsewhere."""
    try:
        return shutil.disk_usage(SHARED_FOLDER).free
    except OSError:
        return math.inf


def free_handles() -> float:
    """How many more files this process may open; infinite where the system doesn't say."""
    if resource is None or not OPEN_FILES.parent.is_dir():
        return math.inf
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        return math.inf if soft == resource.RLIM_INFINITY else soft - sum(1 for _ in OPEN_FILES.iterdir())
    except OSError:  # to look takes one too
        return 0


def most_handles() -> float:
    """How many files a process may open, once it has raised its limit; infinite where the system doesn't say."""
    if resource is None:
        return math.inf
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return math.inf if hard == resource.RLIM_INFINITY else hard


def allow_all_handles() -> None:
    """Raise the limit of open files as far as this process itself may."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _free_of_machine() -> int | None:
    """Free memory, and what the system would free of its file cache."""
    try:
        lines = dict(line.split(":", 1) for line in PROC_MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _free_of_container() -> int | None:
    """What the limit of a container, or of a scheduler's job, leaves."""
    for limit_file, usage_file, cache in CGROUP_FILES:
        try:
            limit, usage = (int((CGROUPS / file).read_text()) for file in (limit_file, usage_file))
            statistics = (CGROUPS / limit_file).with_name("memory.stat").read_text().splitlines()
            return limit - usage + int(dict(line.split() for line in statistics).get(cache, 0))
        except (OSError, ValueError):  # no such file; or the limit is the word `max`
            continue
    return None
