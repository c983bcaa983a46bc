import os
import signal
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from fastmae.errors import InputError
from fastmae.runtime.workers import guarded, heed_only_the_parent, worker_count


class Failing(Dataset):
    def __init__(self, failure):
        self.failure = failure

    def __len__(self):
        return 4

    def __getitem__(self, place):
        if place == 2:
            self.failure()
        return place


def bad_input():
    raise InputError("photo.jpg: damaged: cut short")


def bad_disk():
    raise OSError(5, "Input/output error", "photo.jpg")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_input_is_the_same_line_from_a_worker_as_from_here(workers):
    with pytest.raises(InputError) as caught:
        list(guarded(DataLoader(Failing(bad_input), num_workers=workers)))
    assert str(caught.value) == "photo.jpg: damaged: cut short"


def test_a_failing_disk_in_a_worker_is_one_line():
    with pytest.raises(InputError, match=r"Input/output error.*photo.jpg") as caught:
        list(guarded(DataLoader(Failing(bad_disk), num_workers=1)))
    assert "\n" not in str(caught.value)


def test_a_killed_worker_is_one_line():
    with pytest.raises(InputError, match="fewer --workers"):
        list(guarded(DataLoader(Failing(killed), num_workers=1)))


def test_workers_outlive_ctrl_c_and_sigterm_and_end_with_the_loader():
    def signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    assert len(list(guarded(DataLoader(Failing(signals), num_workers=1, worker_init_fn=heed_only_the_parent)))) == 4


def test_a_process_ends_though_a_loader_outlives_its_main():
    program = """
from torch.utils.data import DataLoader
from fastmae.runtime.workers import heed_only_the_parent
kept = iter(DataLoader(list(range(100)), num_workers=2, worker_init_fn=heed_only_the_parent))
print(int(next(kept)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")


def test_worker_counts():
    assert worker_count(0) == 0
    assert 1 <= worker_count(-1) <= 8
    with pytest.raises(InputError):
        worker_count(-2)
