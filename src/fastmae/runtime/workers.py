"""Worker processes of a DataLoader: how many there are, which signals they obey, and how their errors are reported."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from fastmae.errors import InputError, OneProcessError
from fastmae.runtime.device import own_cores, pins_memory

Batch = TypeVar("Batch")

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals on which a run saves itself and stops: Ctrl-C, and those that schedulers send before they take a machine."""

CORES_LEFT = 2
"""Cores that `--workers -1` leaves to the main process: one for its own thread, one for those of its libraries."""


def worker_count(workers: int) -> int:
    """`--workers` as a number of processes: -1 is all cores of this process but `CORES_LEFT`, at least 1."""
    return workers if workers >= 0 else max(1, own_cores() - CORES_LEFT)


def as_is(batch: Batch) -> Batch:
    """`collate` for a data set that gives whole batches."""
    return batch


def batches(
    dataset: Dataset[Any],
    device: torch.device,
    workers: int,
    *,
    batch_size: int | None = None,
    sampler: Iterable[Any] | None = None,
    batch_sampler: Iterable[Any] | None = None,
    collate: Callable[[Any], Any] | None = None,
    prefetch: int = 2,
) -> Iterator[Any]:
    """Batches of a data set, loaded ahead by worker processes. Every command loads its images this way.

    The batches stay on the CPU. Give one of `batch_size`, `sampler` and `batch_sampler`.

    Args:
        dataset: images by index.
        device: where the batches will be used; for a GPU they are loaded into pinned memory.
        workers: as `--workers`; there are never more workers than batches.
        batch_size: images per batch, in the order of the data set.
        sampler: one entry per batch, for a data set that gives a whole batch for an entry.
        batch_sampler: a list of indices per batch.
        collate: turns the images of a batch into the batch. Default: torch's `default_collate`; with `sampler`,
            `default_convert`.
        prefetch: batches that each worker loads ahead.

    Raises:
        OneProcessError: a worker met bad data or was killed.
    """
    if batch_size is not None:
        batch_sampler = BatchSampler(range(len(dataset)), batch_size, drop_last=False)  # type: ignore[arg-type]
    order = batch_sampler if sampler is None else sampler
    num_workers = min(worker_count(workers), length_hint(order, sys.maxsize))  # a generator's length is unknown
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=1 if sampler is None else None,  # torch wants its default, 1, beside a batch_sampler
        sampler=sampler,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=collate,
        pin_memory=pins_memory(device),
        worker_init_fn=heed_only_the_parent,
    )
    return guarded(loader)


def heed_only_the_parent(_: int) -> None:
    """`worker_init_fn` that leaves it to the main process when to stop.

    Ctrl-C, or a scheduler's signal to a whole job, reaches the workers too; they ignore it. SIGTERM ends a worker only
    if the main process sent it: multiprocessing does so at exit, and then waits for the worker without a limit.
    """
    gc.freeze()  # Python's collector would write to all that a fork shares, and so copy it: 50 to 110 MB
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # without it, as on macOS, DataLoader's own handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_parent_says, daemon=True).start()


def _exit_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


def guarded(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; an error in a worker becomes one line instead of the worker's traceback.

    Raises:
        OneProcessError: a worker met bad data or was killed.
    """
    try:
        yield from loader
        return
    except (InputError, OSError, EOFError, RuntimeError) as error:
        message = _loading_failure(error, has_workers=loader.num_workers > 0)
        if message is None:
            raise
        # torch's `reraise` makes a cycle of the error and its traceback, whose frames hold the workers. Until Python
        # collects it, they would live on, and its collection within a later worker would start a thread there.
        error.__traceback__ = None
    # Raised outside the handler, or the error would stay as the context of this one.
    raise OneProcessError(message)


def _loading_failure(error: Exception, has_workers: bool) -> str | None:
    """What went wrong, as one line; None for an error that is not about loading."""
    text = str(error)
    if text.startswith("Caught ") and not isinstance(error, RuntimeError):
        return text.rstrip().splitlines()[-1].split(": ", 1)[-1]  # a worker's traceback, whose last line is the error
    if isinstance(error, InputError):
        return text  # without workers, this process loads
    # torch notices that a worker died; or fetching a tensor from the dead worker fails.
    if "DataLoader worker (pid" in text or (has_workers and isinstance(error, OSError | EOFError)):
        return (
            "a loading process was killed (out of memory?); "
            "give the same command again to continue, with fewer --workers"
        )
    return None
