"""How a loading process hands a batch over: in shared memory while there is room, otherwise through its pipe.

torch puts each tensor into a file in `SHARED_FOLDER`, and both processes keep it open. A container's folder may be as
small as 64 MB, and a machine may allow few open files. A batch that would not fit is sent as plain bytes instead, which
takes longer but always works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate, get_worker_info

from fastmae.errors import InputError
from fastmae.runtime.memory import SHARED_FOLDER, available_for_sharing, free_handles, free_shared_folder

SPARE_FACTOR = 2
"""Of the folder's free bytes, other processes, and other parts of this one, may use as many as the batches do."""


class Sending:
    """A DataLoader's `collate` that also chooses the way, wherever it runs. In the main process it only collates.

    Args:
        collate: samples -> batch.
        workers: number of loading processes.
        prefetch: batches that each loads ahead.
    """

    def __init__(self, collate: Callable[[Any], Any], workers: int, prefetch: int):
        self.collate, self.workers, self.prefetch = collate, workers, prefetch
        self._is_first = True

    def __call__(self, samples: Any) -> Any:
        """The batch; or `Sent`, which `workers.batches` unpacks.

        Raises:
            InputError: as many batches as are loaded ahead don't fit into memory.
        """
        batch, worker = self.collate(samples), get_worker_info()
        if worker is None:
            return batch
        tensors: list[torch.Tensor] = []
        mapped(batch, torch.Tensor, tensors.append)
        if not tensors:
            return batch
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        if self._is_first and worker.id == 0:
            self._check_memory(num_bytes)
        self._is_first = False
        obstacle = self._share(tensors, num_bytes)
        return Sent.of(batch, obstacle) if obstacle else batch

    def _check_memory(self, num_bytes: int) -> None:
        ahead, available = self.workers * self.prefetch, available_for_sharing()
        made = self.workers * num_bytes  # at most, so far
        if available is not None and ahead * num_bytes > available + made:
            raise InputError(
                f"the loading processes hold {ahead} batches of {num_bytes / 1e6:.0f} MB ahead, and "
                f"{available / 1e6:.0f} MB of memory are free; give fewer --workers or smaller batches"
            )

    def _share(self, tensors: Sequence[torch.Tensor], num_bytes: int) -> str:
        """Move the tensors to shared memory. Where there is no room for those of all processes, returns what lacks."""
        ahead = self.workers * self.prefetch
        if ahead * len(tensors) > free_handles():
            return "too few more files may be open (ulimit -n)"
        no_room = f"{SHARED_FOLDER} has too little room for {num_bytes / 1e6:.0f} MB a batch (docker: --shm-size)"
        if SPARE_FACTOR * self.workers * num_bytes > free_shared_folder():
            return no_room
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except (RuntimeError, OSError):  # another process has taken the room since
            return no_room
        return ""


@dataclass
class Sent:
    """A batch as it goes through a pipe.

    Attributes:
        batch: with `SentTensor` in place of tensors.
        obstacle: why it is not in shared memory.
    """

    batch: Any
    obstacle: str

    @classmethod
    def of(cls, batch: Any, obstacle: str) -> "Sent":
        """Pack a batch."""
        return cls(mapped(batch, torch.Tensor, SentTensor.of), obstacle)

    def unpacked(self) -> Any:
        """The batch."""
        return mapped(self.batch, SentTensor, SentTensor.unpacked)

    def pin_memory(self, device: Any = None) -> "Sent":
        """The same with its tensors unpacked, in pinned memory; torch calls this."""
        return replace(self, batch=mapped(self.unpacked(), torch.Tensor, torch.Tensor.pin_memory))


@dataclass
class SentTensor:
    """A tensor as bytes.

    Attributes:
        data: uint8 [bytes].
        dtype: of the tensor.
        shape: of the tensor.
    """

    data: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "SentTensor":
        """Pack a tensor of the CPU."""
        return cls(tensor.contiguous().view(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)

    def unpacked(self) -> torch.Tensor:
        """The tensor."""
        return torch.from_numpy(self.data).view(self.dtype).view(self.shape)


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """A batch with each part of a kind replaced, in dataclasses (frozen ones too), dictionaries, lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: mapped(getattr(value, name), kind, function) for name in names})
    if isinstance(value, dict):
        return {key: mapped(part, kind, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [mapped(part, kind, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def collated(samples: list[Any]) -> Any:
    """torch's `default_collate`, which in a loading process would itself take shared memory, room or not."""
    first = samples[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(samples)
    if isinstance(first, tuple | list):
        return [collated(list(column)) for column in zip(*samples, strict=True)]
    return default_collate(samples)
