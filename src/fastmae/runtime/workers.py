"""A DataLoader's worker processes: how many, what signals they heed, and how their errors come out as one line."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from fastmae.errors import InputError, OneProcessError
from fastmae.runtime.device import cores

Batch = TypeVar("Batch")
# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""On which a run saves itself and stops: Ctrl-C, and what schedulers send before they take a machine away."""


def worker_count(wanted: int) -> int:
    """`--workers` -> loading processes: -1 leaves one core to the model and takes at most 8.

    Raises:
        InputError: less than -1.
    """
    if wanted < -1:
        raise InputError(f"--workers {wanted}: give 0 or more, or -1 to choose by the cores")
    return wanted if wanted >= 0 else max(1, min(8, cores() - 1))


def heed_only_the_parent(_: int) -> None:
    """For workers: Ctrl-C, or a scheduler's signal to all, reaches them too; when to stop is the main process's decision.

    The main process's own SIGTERM ends a worker: multiprocessing sends it at exit and then waits without a limit.
    """
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none, and keeps the loader's own handler
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_parent_says, daemon=True).start()


def _exit_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


def guarded(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches, with what goes wrong in a worker as one line instead of that worker's traceback.

    Raises:
        OneProcessError: raised by a worker on bad data, or a worker that was killed.
    """
    try:
        yield from loader
        return
    except (InputError, OSError, EOFError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, RuntimeError) and text.startswith(
            "Caught "
        ):  # a worker's own error, with its traceback as text
            failure = text.rstrip().splitlines()[-1].split(": ", 1)[-1]
        elif isinstance(error, InputError):  # raised in this process, which loads by itself
            failure = text
        elif "DataLoader worker (pid" in text or (loader.num_workers and isinstance(error, OSError | EOFError)):
            # Noticed by torch, or by this process when it came to fetch a tensor from a worker that was gone.
            failure = "a loading process was killed (out of memory?); give the same command again to continue, with fewer --workers"
        else:
            raise
    # Raised out here, so that the error does not keep the loader's frames, and with them its processes, alive.
    raise OneProcessError(failure)
