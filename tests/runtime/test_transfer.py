"""Copies to a device run ahead, wait for nothing that they need not wait for, and never lose what they read from."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastmae.runtime.transfer import AHEAD, copied_ahead, held_batches

META = torch.device("meta")  # stands for a device: it is not the CPU and holds no values


class Streams:
    """A device's module that writes down what happens on its streams. Copies end when someone waits for them."""

    def __init__(self, done_at_once):
        self.log, self.done_at_once, self.current = [], done_at_once, "computing"
        self.Stream = lambda device: "copying"
        self.Event = lambda: Event(self)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, device):
        return SimpleNamespace(wait_event=lambda event: self.log.append(("waits", event.number)))


class Event:
    """The end of a copy."""

    def __init__(self, streams):
        self.streams, self.number = streams, sum(kind == "copies" for kind, _ in streams.log)
        assert streams.current == "copying"

    def record(self, stream):
        assert stream == "copying"
        self.streams.log.append(("copies", self.number))

    def query(self):
        return self.streams.done_at_once

    def synchronize(self):
        self.streams.log.append(("finishes", self.number))


@pytest.fixture
def device_with(monkeypatch):
    """(module of the device) -> the device has it."""

    def set_module(module):
        monkeypatch.setattr(torch, "get_device_module", lambda _: module)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: module.log.append(("keeps", None)))

    return set_module


def numbered(count, log):
    for number in range(count):
        log.append(("loads", number))
        yield {"numbers": [torch.full((2,), number)]}


def test_two_batches_are_copied_ahead_and_the_host_waits_for_no_copy_that_is_done(device_with):
    streams = Streams(done_at_once=True)
    device_with(streams)
    for batch in copied_ahead(numbered(6, streams.log), META):
        assert batch["numbers"][0].device == META
        streams.log.append(("computes", None))
    log = [entry for entry in streams.log if entry[0] in ("loads", "copies", "waits")]
    assert "finishes" not in dict(streams.log)
    assert sum(kind == "computes" for kind, _ in streams.log) == sum(kind == "keeps" for kind, _ in streams.log) == 6
    for number in range(6):
        # The stream that computes waits for the batch's copy, after the next copies were given out.
        ahead = min(5, number + AHEAD)
        assert log.index(("copies", number)) < log.index(("copies", ahead)) + 1 <= log.index(("waits", number))
        if number + AHEAD + 1 < 6:
            assert log.index(("waits", number)) < log.index(("loads", number + AHEAD + 1))


def test_a_batch_is_given_up_only_when_its_copy_is_done(device_with):
    streams = Streams(done_at_once=False)
    device_with(streams)
    assert len(list(copied_ahead(numbered(7, streams.log), META))) == 7
    held = held_batches(META)
    for number in range(7 - held):
        assert streams.log.index(("finishes", number)) < streams.log.index(("loads", number + held))


def test_a_device_without_streams_gets_each_batch_when_it_is_asked_for(device_with):
    log = []
    device_with(SimpleNamespace(log=log))
    for number, batch in enumerate(copied_ahead(numbered(4, log), META)):
        assert batch["numbers"][0].device == META
        assert log == [("loads", loaded) for loaded in range(number + 1)]


def test_on_the_cpu_batches_stay_where_they_are():
    batches = [torch.ones(2), torch.zeros(3)]
    assert all(here is there for here, there in zip(copied_ahead(batches, torch.device("cpu")), batches, strict=True))
    assert held_batches(torch.device("cpu")) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_a_gpu():
    batches = [torch.full((1000, 1000), number).pin_memory() for number in range(8)]
    for number, batch in enumerate(copied_ahead(batches, torch.device("cuda:0"))):
        assert batch.is_cuda
        assert (batch == number).all()
