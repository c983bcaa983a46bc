"""Memory for worker processes: it is shared however they are started, and what limits it is read from the system."""

import multiprocessing
import shutil

import pytest
import torch

from fastmae.runtime import memory
from fastmae.runtime.memory import available_for_sharing, shared_memory

GB = 1_000_000_000


def test_a_fork_writes_into_memory_that_both_see():
    shared = shared_memory(100)
    shared.zero_()
    fork = multiprocessing.get_context("fork").Process(target=shared.fill_, args=(7,))
    fork.start()
    fork.join()
    assert shared.tolist() == [7] * 100


@pytest.mark.slow
def test_a_process_started_afresh_writes_into_memory_that_both_see(monkeypatch):
    monkeypatch.setattr(memory, "inherits_memory", lambda: False)
    shared = shared_memory(100)
    shared.zero_()
    # torch's processes send a tensor as a reference to its memory, as a DataLoader does.
    spawned = torch.multiprocessing.get_context("spawn").Process(target=torch.Tensor.fill_, args=(shared, 7))
    spawned.start()
    spawned.join()
    assert shared.tolist() == [7] * 100


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A system with 8 GB available, without containers; (file, content) -> writes one of its cgroup's files."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {16 * GB // 1024} kB\nMemAvailable:  {8 * GB // 1024} kB\nHugePages_Total: 0\n")
    cgroup = tmp_path / "cgroup"
    monkeypatch.setattr(memory, "PROC_MEMORY", meminfo)
    monkeypatch.setattr(memory, "CGROUPS", cgroup)

    def write(file, content):
        (cgroup / file).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / file).write_text(content)

    return write


def test_a_container_leaves_its_limit_less_what_is_used_and_is_no_file_cache(system):
    assert available_for_sharing() == pytest.approx(8 * GB, abs=1024)
    system("memory/memory.limit_in_bytes", f"{3 * GB}\n")
    system("memory/memory.usage_in_bytes", f"{2 * GB}\n")
    system("memory/memory.stat", f"cache 5\ntotal_inactive_file {GB}\n")
    assert available_for_sharing() == 2 * GB
    system("memory.max", f"{4 * GB}\n")
    system("memory.current", f"{3 * GB}\n")
    system("memory.stat", "anon 5\ninactive_file 0\n")
    assert available_for_sharing() == GB


def test_a_container_without_a_limit_has_the_machines_memory(system):
    system("memory.max", "max\n")
    system("memory.current", "5\n")
    assert available_for_sharing() == pytest.approx(8 * GB, abs=1024)


def test_named_memory_is_limited_by_its_folder_and_inherited_memory_is_not(system, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SHARED_FOLDER", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    assert available_for_sharing() == pytest.approx(8 * GB, abs=1024)
    monkeypatch.setattr(memory, "inherits_memory", lambda: False)
    assert available_for_sharing() == 64 << 20


def test_a_system_that_does_not_say_sets_no_limit(system, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC_MEMORY", tmp_path / "none")
    assert available_for_sharing() is None
