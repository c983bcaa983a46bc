"""A batch arrives as the data set made it, through shared memory or through the pipe."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from fastmae.errors import InputError
from fastmae.runtime import sending, workers
from fastmae.runtime.sending import Sent, collated
from fastmae.runtime.workers import as_is, batches

pytestmark = pytest.mark.promise("machine")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    names: list[str]
    pixels: torch.Tensor
    sums: torch.Tensor | None


class Batches(Dataset):
    """Whole batches, with tensors of several types and shapes."""

    def __getitem__(self, number):
        pixels = torch.arange(24, dtype=torch.uint8).view(2, 3, 4).transpose(0, 2) + number
        return Batch([f"image {number}"], pixels, None), [torch.tensor(number, dtype=torch.bfloat16)]


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    """A warning is told once in a process; here, in each test."""
    monkeypatch.setattr(workers, "_told", set())


@pytest.fixture(params=["shared memory", "the pipe", "a lost race"])
def way(request, monkeypatch):
    """The way that batches take; in a lost race the room is gone when it is to be taken."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    if request.param == "the pipe":
        monkeypatch.setattr(sending, "free_shared_folder", lambda: 0)
    if request.param == "a lost race":
        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    return request.param


@pytest.mark.promise("machine")
def test_a_batch_is_the_same_whichever_way_it_comes(way, caplog):
    for number, (batch, (scalar,)) in enumerate(batches(Batches(), CPU, 1, sampler=range(3), collate=as_is)):
        expected, _ = Batches()[number]
        assert (batch.names, batch.sums) == (expected.names, None)
        assert torch.equal(batch.pixels, expected.pixels)
        assert batch.pixels.is_shared() == (way == "shared memory")
        assert (scalar.dtype, scalar.item()) == (torch.bfloat16, number)
    told = [message for message in caplog.messages if "too little room" in message]
    assert len(told) == (way != "shared memory")
    assert all(message.startswith("loading processes send their batches through pipes") for message in told)


@pytest.mark.promise("machine")
def test_batches_go_through_the_pipe_where_few_files_may_be_open(monkeypatch, caplog):
    monkeypatch.setattr(sending, "free_handles", lambda: 3)
    (batch, _) = next(batches(Batches(), CPU, 1, sampler=[0], collate=as_is))
    assert not batch.pixels.is_shared()
    assert caplog.messages[-1].endswith("takes longer: too few more files may be open (ulimit -n)")


def test_without_workers_a_batch_is_not_touched(monkeypatch):
    monkeypatch.setattr(sending, "available_for_sharing", lambda: 0)
    assert not next(batches(Batches(), CPU, 0, sampler=[0], collate=as_is))[0].pixels.is_shared()


@pytest.mark.promise("machine")
def test_batches_that_fill_the_memory_ahead_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr(sending, "available_for_sharing", lambda: 10)
    with pytest.raises(InputError, match="hold 2 batches of 0 MB ahead, and 0 MB") as line:
        next(batches(Batches(), CPU, 1, sampler=range(3), collate=as_is))
    assert str(line.value).endswith("give fewer --workers or smaller batches")
    monkeypatch.setattr(sending, "available_for_sharing", lambda: math.inf)
    next(batches(Batches(), CPU, 1, sampler=range(3), collate=as_is))


def test_collating_is_torchs_own():
    samples = [(torch.full((2,), float(number)), number, {"a": [number / 2]}) for number in range(3)]
    ours, theirs = collated(samples), default_collate(samples)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[1].dtype == theirs[1].dtype
    assert torch.equal(ours[2]["a"][0], theirs[2]["a"][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_of_the_pipe_is_pinned():
    batch, _ = Sent.of(Batches()[1], "no room").pin_memory().unpacked()
    assert batch.pixels.is_pinned()
