"""Copies beside an accelerator's computation: what is uploaded and downloaded, and what waits for what."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastmae.runtime import copies
from fastmae.runtime.copies import CopyLanes

CPU = torch.device("cpu")


def test_without_streams_tensors_come_back_as_they_are():
    lanes = CopyLanes(CPU)
    pixels = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    assert torch.equal(lanes.upload(pixels), pixels)
    codes, sums = pixels + 1, pixels.double().sum(0)
    assert all(map(torch.equal, lanes.download([codes, sums]).wait(), [codes, sums]))


@pytest.fixture
def order(monkeypatch):
    """What a device with streams is asked to do, in order. It computes on the CPU."""
    asked: list[str] = []
    current = ["computing"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    class Event:
        def __init__(self, blocking):
            assert blocking

        def record(self, stream):
            asked.append(f"event on {stream.name}")

        def synchronize(self):
            asked.append("wait for the event")

    @contextlib.contextmanager
    def within(stream):
        current.append(stream.name)
        yield
        current.pop()

    names = iter(("up", "down"))
    streams = SimpleNamespace(
        Stream=lambda _: Stream(next(names)), Event=Event, stream=within, current_stream=lambda _: Stream("computing")
    )
    empty, copy = torch.empty, torch.Tensor.copy_

    def copy_(self, other, non_blocking=False):
        if non_blocking:
            asked.append(f"copy on {current[-1]}")
        return copy(self, other)

    def unpinned(*shape, pin_memory, **options):
        assert pin_memory
        return empty(*shape, **options)

    monkeypatch.setattr(copies, "streams_of", lambda _: streams)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, stream: asked.append(f"keep for {stream.name}"), raising=False
    )
    return asked


def test_copies_run_on_streams_of_their_own_and_only_the_result_is_waited_for(order):
    lanes = CopyLanes(CPU)
    pixels = torch.arange(6, dtype=torch.uint8)
    uploaded = lanes.upload(pixels)
    assert order == ["computing waits for up", "keep for computing"]
    order.clear()
    codes = uploaded + 1
    download = lanes.download([codes, codes.sum()])
    assert order == [
        "down waits for computing",
        *("copy on down", "keep for down", "copy on down", "keep for down"),
        "event on down",
    ]
    order.clear()
    assert all(map(torch.equal, download.wait(), [codes, codes.sum()]))
    assert order == ["wait for the event"]
