"""From the CPU to the device: batches are copied on a stream of their own while earlier ones are computed on."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from fastmae.runtime.fabric import apply_to_collection

Batch = TypeVar("Batch")


@runtime_checkable
class Movable(Protocol):
    """What is moved as a whole: a tensor, or an object that Fabric doesn't look into."""

    def to(self, device: torch.device, *, non_blocking: bool) -> "Movable":
        """A copy on the device."""
        ...

    def record_stream(self, stream: Any) -> object:
        """Its memory is not reused before the stream has done what it was given so far."""
        ...


AHEAD = 2
"""Batches that are copied before they are asked for."""


def held_batches(device: torch.device) -> int:
    """How many of the latest batches on the CPU `copied_ahead` needs unchanged: see `runtime.ring.ring_batches`.

    On the CPU it is the one in use. Elsewhere the one before it may still be on its way.
    """
    return 1 if device.type == "cpu" else 2


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; on the CPU, as they are.

    On a device with streams, `AHEAD` batches are on their way while one is computed on. The computing stream waits for
    a batch's copy. This process does not, unless the copy before the latest one isn't done when another batch is asked
    for. A device without streams gets each batch when it is asked for.

    Args:
        batches: on the CPU, pinned where the device needs it (`pins_memory`). Each must stay unchanged until
            `held_batches` more have been asked for.
        device: where they go.
    """
    streams = torch.get_device_module(device)
    if device.type == "cpu":
        yield from batches
    elif not all(hasattr(streams, name) for name in ("Stream", "Event", "stream", "current_stream")):
        for batch in batches:
            yield _on_device(batch, device, non_blocking=False)
    else:
        yield from _on_own_stream(batches, device, streams)


def _on_own_stream(batches: Iterable[Batch], device: torch.device, streams: Any) -> Iterator[Batch]:
    """As `copied_ahead`. `streams` is the device's module, such as torch.cuda."""
    own_stream = streams.Stream(device=device)
    copies: deque[tuple[Batch, Any]] = deque()  # not yet given out, each with the event of its end
    unfinished: deque[tuple[Batch, Any]] = deque()  # sources that a copy may still read
    for batch in batches:
        with streams.stream(own_stream):
            copy, end = _on_device(batch, device, non_blocking=True), streams.Event()
            end.record(own_stream)
        copies.append((copy, end))
        unfinished.append((batch, end))
        if len(copies) > AHEAD:
            yield _ready(*copies.popleft(), streams.current_stream(device))
        if len(unfinished) == held_batches(device):
            _, end = unfinished.popleft()
            if not end.query():
                end.synchronize()
    while copies:
        yield _ready(*copies.popleft(), streams.current_stream(device))


def _ready(copy: Batch, end: Any, stream: Any) -> Batch:
    """A copy that the stream may use: it waits for the copy's end, and the memory is not reused before it is done."""
    stream.wait_event(end)
    apply_to_collection(copy, Movable, lambda part: part.record_stream(stream))
    return copy


def _on_device(batch: Batch, device: torch.device, non_blocking: bool) -> Batch:
    moved: Batch = apply_to_collection(batch, Movable, lambda part: part.to(device, non_blocking=non_blocking))
    return moved
