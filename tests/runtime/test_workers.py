import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastmae.errors import InputError
from fastmae.runtime import workers
from fastmae.runtime.workers import as_is, batches, guarded, heed_only_the_parent, worker_count, workers_that_fit

CPU = torch.device("cpu")


class Failing(Dataset):
    """Four numbers; at one of them, something happens."""

    def __init__(self, failure):
        self.failure = failure

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            self.failure()
        return index


class Frozen(Dataset):
    """Whether Python's collector leaves alone what the process got from its parent."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return gc.get_freeze_count() > 10_000


class Squares(Dataset):
    """Ten squares: by an index, or a whole batch at once."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index**2 if isinstance(index, int) else [self[i] for i in index]


def damaged_image():
    raise InputError("photo.jpg: damaged: cut short")


def failing_disk():
    raise OSError(5, "Input/output error", "photo.jpg")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_input_is_the_same_line_with_and_without_workers(num_workers):
    with pytest.raises(InputError) as caught:
        list(guarded(DataLoader(Failing(damaged_image), num_workers=num_workers)))
    assert str(caught.value) == "photo.jpg: damaged: cut short"
    assert multiprocessing.active_children() == []


def test_a_failing_disk_in_a_worker_is_one_line():
    with pytest.raises(InputError, match=r"Input/output error.*photo.jpg") as caught:
        list(guarded(DataLoader(Failing(failing_disk), num_workers=1)))
    assert "\n" not in str(caught.value)


def killed_at_2():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.promise("machine")
def test_a_killed_worker_is_one_line():
    with pytest.raises(InputError, match="a loading process was killed") as caught:
        list(batches(Failing(killed_at_2), CPU, 1, batch_size=1))
    assert "--workers" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.promise("machine")
def test_a_killed_worker_interrupts_nothing_but_the_wait_for_a_batch():
    loaded = batches(Squares(), CPU, 1, batch_size=1, prefetch=1)
    next(loaded)
    (process,) = multiprocessing.active_children()
    process.kill()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:  # an optimizer's step, say
        time.sleep(0.01)
    with pytest.raises(InputError, match="a loading process was killed"):
        list(loaded)


@pytest.mark.promise("machine")
def test_workers_that_give_nothing_are_an_error_and_end(monkeypatch):
    monkeypatch.setattr(workers, "LOOKS_EVERY", 0.1)
    monkeypatch.setattr(workers, "STALLED_AFTER", 0.3)
    with pytest.raises(InputError, match=r"\(\d+\) have given nothing for 0.005 minutes; see") as caught:
        list(batches(Failing(lambda: time.sleep(600)), CPU, 1, batch_size=4))
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.promise("machine")
@pytest.mark.parametrize(
    ("handles", "memory", "fitting", "reason"),
    [
        (1000, 10**10, 4, ""),
        (21, 10**10, 2, "open files"),
        (5, 10**10, 0, "open files"),
        (math.inf, 350_000_000, 3, "free memory"),
        (math.inf, None, 4, ""),
    ],
)
def test_no_more_workers_are_started_than_fit(handles, memory, fitting, reason, monkeypatch, caplog):
    monkeypatch.setattr(workers, "_told", set())
    monkeypatch.setattr(workers, "free_handles", lambda: handles)
    monkeypatch.setattr(workers, "allow_all_handles", lambda: None)
    monkeypatch.setattr(workers, "available_for_sharing", lambda: memory)
    assert workers_that_fit(4) == workers_that_fit(4) == fitting
    lines = [f"{fitting} loading processes instead of 4: there are too few"] if reason else []
    assert [record.getMessage().split(" open")[0].split(" free")[0] for record in caplog.records] == lines
    assert reason in caplog.text


@pytest.mark.promise("machine")
def test_where_no_worker_can_be_started_this_process_loads(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "_told", set())
    monkeypatch.setattr(multiprocessing, "Queue", full)
    assert next(batches(Squares(), CPU, 2, batch_size=5)).tolist() == [0, 1, 4, 9, 16]
    assert "no loading processes can be started (No space left on device)" in caplog.text


def test_workers_survive_ctrl_c_and_sigterm_and_end_with_the_loader():
    def signal_all():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    loader = DataLoader(Failing(signal_all), num_workers=1, worker_init_fn=heed_only_the_parent)
    assert len(list(guarded(loader))) == 4


@pytest.mark.slow
def test_a_process_ends_even_if_its_loader_still_has_workers():
    program = """
import torch
from fastmae.runtime.workers import batches
kept = batches(list(range(100)), torch.device("cpu"), 2, batch_size=1)
print(int(next(kept)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")


def test_minus_one_chooses_the_number_of_workers_by_the_cores(monkeypatch):
    assert worker_count(0) == 0
    for cores, expected in ((1, 1), (2, 1), (6, 4), (64, 62)):
        monkeypatch.setattr(workers, "own_cores", lambda cores=cores: cores)
        assert worker_count(-1) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_the_batch_size_or_a_sampler(num_workers):
    by_size = list(batches(Squares(), CPU, num_workers, batch_size=4))
    assert [batch.tolist() for batch in by_size] == [[0, 1, 4, 9], [16, 25, 36, 49], [64, 81]]
    lists = [[3, 1], [9]]
    assert [batch.tolist() for batch in batches(Squares(), CPU, num_workers, batch_sampler=lists)] == [[9, 1], [81]]
    whole = batches(Squares(), CPU, num_workers, sampler=[range(2), range(4, 6)], collate=as_is)
    assert list(whole) == [[0, 1], [16, 25]]
    generated = batches(Squares(), CPU, num_workers, sampler=(range(n, n + 1) for n in range(3)), collate=as_is)
    assert list(generated) == [[0], [1], [4]]
    assert list(batches(Squares(), CPU, num_workers, batch_sampler=[])) == []


def test_there_are_never_more_workers_than_batches(monkeypatch):
    loaders = []
    monkeypatch.setattr(workers, "guarded", loaders.append)
    for order in (
        {"batch_size": 4},
        {"sampler": [range(2)]},
        {"batch_sampler": []},
        {"sampler": iter(map(range, [2]))},
    ):
        batches(Squares(), CPU, 7, **order)
    assert [loader.num_workers for loader in loaders] == [3, 1, 0, 7]
    assert all(loader.worker_init_fn is heed_only_the_parent for loader in loaders)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned():
    batch = next(batches(Squares(), torch.device("cuda:0"), 0, batch_size=4))
    assert batch.device.type == "cpu"
    assert batch.is_pinned()


def test_the_memory_that_a_worker_shares_with_its_parent_is_not_collected():
    assert [batch.tolist() for batch in batches(Frozen(), CPU, 1, batch_size=1)] == [[True], [True]]
    assert gc.get_freeze_count() == 0
