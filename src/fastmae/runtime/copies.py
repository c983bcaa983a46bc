"""Copies between the CPU and an accelerator that neither of them waits for, where the device has streams."""

from collections.abc import Sequence
from typing import Any

import torch

from fastmae.runtime.device import pins_memory


def streams_of(device: torch.device) -> Any:
    """torch's module with `Stream` and `Event` for a device whose copies get streams of their own; None for others."""
    return torch.cuda if device.type == "cuda" and pins_memory(device) else None


class CopyLanes:
    """One lane up to the device and one down, beside its computation.

    On CUDA these are two streams with pinned memory. On a device without streams, an upload is an ordinary copy, and a
    download is one that is made when its result is asked for.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.streams = streams_of(device)
        if self.streams:
            self.up, self.down = self.streams.Stream(device), self.streams.Stream(device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the CPU on the device. What is computed from it there waits for the copy."""
        if not self.streams:
            return tensor.to(self.device)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        computing = self.streams.current_stream(self.device)
        with self.streams.stream(self.up):
            uploaded = pinned.to(self.device, non_blocking=True)
        computing.wait_stream(self.up)
        uploaded.record_stream(computing)
        return uploaded

    def download(self, tensors: Sequence[torch.Tensor]) -> "Download":
        """Start to copy tensors to the CPU, as soon as the device has computed them."""
        if not self.streams:
            return Download(tensors)
        self.down.wait_stream(self.streams.current_stream(self.device))
        arrived = self.streams.Event(blocking=True)  # the waiting thread sleeps
        with self.streams.stream(self.down):
            copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(self.down)
            arrived.record(self.down)
        return Download(copies, arrived)


class Download:
    """Tensors on their way to the CPU.

    Args:
        tensors: copies on the CPU that are complete after `arrived`; or tensors on the device.
        arrived: event after the last copy; None if the copies are still to be made.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], arrived: Any = None):
        self.tensors, self.arrived = tensors, arrived

    def wait(self) -> list[torch.Tensor]:
        """The tensors, on the CPU."""
        if self.arrived is None:
            return [tensor.cpu() for tensor in self.tensors]
        self.arrived.synchronize()
        return list(self.tensors)
