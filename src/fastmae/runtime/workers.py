"""Worker processes of a DataLoader: how many there are, which signals they obey, and how their errors are reported."""

import contextlib
import errno
import gc
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_convert

from fastmae.errors import InputError, OneProcessError
from fastmae.runtime.device import local_processes, own_cores, pins_memory
from fastmae.runtime.ending import STOP_SIGNALS
from fastmae.runtime.memory import allow_all_handles, available_for_sharing, free_handles
from fastmae.runtime.sending import Sending, Sent, collated

Batch = TypeVar("Batch")

log = logging.getLogger(__name__)

CORES_LEFT = 2
"""Cores that `--workers -1` leaves to the main process: one for its own thread, one for those of its libraries."""
HANDLES_OF_A_WORKER, HANDLES_LEFT = 5, 10
"""Open files that a loading process takes in the main one (measured), and those that are left to everything else."""
MEMORY_OF_A_WORKER = 100_000_000
"""Bytes that a loading process takes for itself, beside its batches."""
LOOKS_EVERY = 1.0
"""Seconds between two looks at whether the loading processes are still there."""
STALLED_AFTER = 900.0
"""Seconds without a batch after which loading has failed: the disk is gone, say. A remote store's shard takes less."""
END = object()
_told: set[str] = set()


def worker_count(workers: int) -> int:
    """`--workers` as a number of processes: -1 is all cores of this process but `CORES_LEFT`, at least 1."""
    return workers if workers >= 0 else max(1, own_cores() - CORES_LEFT)


def workers_that_fit(workers: int) -> int:
    """As many of these loading processes as memory and the number of open files allow; a line if they are fewer."""
    if not workers:
        return 0
    if (workers * HANDLES_OF_A_WORKER + HANDLES_LEFT) > free_handles():
        allow_all_handles()
    by_handles, available = (free_handles() - HANDLES_LEFT) / HANDLES_OF_A_WORKER, available_for_sharing()
    by_memory = math.inf if available is None else available / MEMORY_OF_A_WORKER / local_processes()
    fitting = int(max(0, min(workers, by_handles, by_memory)))
    if fitting < workers:
        limit = "open files (ulimit -n)" if by_handles < by_memory else "free memory"
        _tell(f"{fitting} loading processes instead of {workers}: there are too few {limit} for more")
    return fitting


def _tell(line: str) -> None:
    """A warning, once: a command may load many times."""
    if line not in _told:
        _told.add(line)
        log.warning(line)


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
        OneProcessError: a worker met bad data, was killed, or has given nothing for `STALLED_AFTER` seconds.
    """
    if batch_size is not None:
        batch_sampler = BatchSampler(range(len(dataset)), batch_size, drop_last=False)  # type: ignore[arg-type]
    order = batch_sampler if sampler is None else sampler
    num_workers = min(worker_count(workers), length_hint(order, sys.maxsize))  # a generator's length is unknown
    num_workers = workers_that_fit(num_workers)
    if collate is None:
        collate = collated if sampler is None else default_convert
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=1 if sampler is None else None,  # torch wants its default, 1, beside a batch_sampler
        sampler=sampler,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=Sending(collate, num_workers, prefetch),
        timeout=LOOKS_EVERY if num_workers else 0,
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

    Where not a single worker can be started, this process loads.

    Raises:
        OneProcessError: a worker met bad data, was killed, or has given nothing for `STALLED_AFTER` seconds.
    """
    try:
        yield from _delivered(loader)
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


def _delivered(loader: DataLoader[Any]) -> Iterator[Any]:
    others = set(multiprocessing.active_children())
    iterator = _started(loader)
    own = [process for process in multiprocessing.active_children() if process not in others]
    try:
        while (batch := _next(iterator, own)) is not END:
            yield _received(batch)
    except KeyboardInterrupt:  # torch would wait for what they are loading
        for process in own:
            process.terminate()
        raise


def _received(batch: Any) -> Any:
    """A batch as the data set has made it, whichever way it came."""
    if not isinstance(batch, Sent):
        return batch
    _tell(f"loading processes send their batches through pipes, which takes longer: {batch.obstacle}")
    return batch.unpacked()


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, with its workers, or without where the system has no room for their pipes and locks."""
    try:
        if loader.num_workers:
            multiprocessing.Queue().close()  # torch's iterator complains of itself if it can't have all of its own
        iterator = iter(loader)
    except OSError as error:
        if not loader.num_workers:
            raise
        _tell(f"no loading processes can be started ({error.strerror or error}), so this process loads by itself")
        loader.num_workers, loader.prefetch_factor, loader.timeout = 0, None, 0
        return iter(loader)
    deaths.take_over()
    return iterator


def _next(iterator: Iterator[Any], workers: list[Any]) -> Any:
    """The next batch; `END` after the last one."""
    start = time.monotonic()
    while True:
        try:
            with deaths.heeded():
                return next(iterator, END)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
        if time.monotonic() - start > STALLED_AFTER:
            for process in workers:
                process.kill()
            raise OneProcessError(
                f"{len(workers)} loading processes ({', '.join(str(process.pid) for process in workers)}) have given "
                f"nothing for {STALLED_AFTER / 60:g} minutes; see whether the images can still be read, and give the "
                "same command again to continue"
            )


class _Deaths:
    """torch's handler of SIGCHLD, held back while the main thread is not waiting for a batch.

    By itself it raises an error about a killed worker wherever the main thread is: in the middle of an optimizer's
    step, or while a run is saved. Held back, it does so when the next batch is waited for.
    """

    def __init__(self) -> None:
        self.of_torch: Any = None
        self.waits = self.has_come = False

    def take_over(self) -> None:
        """After torch has set its handler."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._note:
            self.of_torch = handler
            signal.signal(signal.SIGCHLD, self._note)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """The death of a worker raises an error within.

        Raises:
            RuntimeError: torch's, which names the worker.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, self.waits = self.waits, True
        try:
            if self.has_come:
                self._note(signal.SIGCHLD, None)
            yield
        finally:
            self.waits = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.has_come = not self.waits
        if self.waits:
            self.of_torch(number, frame)


deaths = _Deaths()


def _loading_failure(error: Exception, has_workers: bool) -> str | None:
    """What went wrong, as one line; None for an error that is not about loading."""
    text = str(error)
    if text.startswith("Caught ") and not isinstance(error, RuntimeError):
        return text.rstrip().splitlines()[-1].split(": ", 1)[-1]  # a worker's traceback, whose last line is the error
    if isinstance(error, InputError):
        return text  # without workers, this process loads
    if has_workers and ("Too many open files" in text or getattr(error, "errno", None) == errno.EMFILE):
        return "too many open files; raise the limit (ulimit -n), or give fewer --workers"
    # torch notices that a worker died; or fetching a tensor from the dead worker fails.
    if "DataLoader worker (pid" in text or (has_workers and isinstance(error, OSError | EOFError)):
        return (
            "a loading process was killed (out of memory?); "
            "give the same command again to continue, with fewer --workers"
        )
    return None
