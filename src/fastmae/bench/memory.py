"""The peak memory of a piece of work, measured in a process of its own so that nothing that ran before it counts."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastmae.errors import InputError

STATUS = Path("/proc/self/status")
MEGABYTE = 2**20
"""As in the paper's Table 2."""

Result = TypeVar("Result")


class FreshProcesses:
    """Runs each function in a new process that has imported a module and computed nothing yet.

    Args:
        module: name of the module, imported once in the server process from which the others are forked.
    """

    def __init__(self, module: str):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([module])
        with _ctrl_c_ignored():  # by the server; this process ends it and its processes
            forkserver.ensure_running()

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in a new process and return its result.

        Raises:
            InputError: the system killed the process, most likely because it took too much memory.
        """
        with ProcessPoolExecutor(1, mp_context=self.context) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool as error:
                raise InputError("a step needs more memory than there is; give a smaller --batch-size") from error
            except KeyboardInterrupt:
                self._end_now()
                raise

    def _end_now(self) -> None:
        """End the server and its processes. The pool would wait for its own, the server import to the end."""
        server = getattr(forkserver._forkserver, "_forkserver_pid", None)
        if server is not None:
            os.kill(server, signal.SIGKILL)
        for process in multiprocessing.active_children():
            process.kill()


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may say so
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def peak_memory_of(work: Callable[[], object], device: torch.device) -> float:
    """The peak memory of a piece of work, in MB of 2^20 bytes.

    On an accelerator this is what torch allocated there, if it counts that. Otherwise it is how much the process's
    peak resident memory grew.

    Args:
        work: the work, including everything that it builds.
        device: where it computes.
    """
    before = _peak_resident_bytes()
    work()
    allocated = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if allocated is not None:
        return allocated(device) / MEGABYTE
    return (_peak_resident_bytes() - before) / MEGABYTE


def _peak_resident_bytes() -> int:
    # On Linux the peak that `getrusage` gives is inherited from the parent process, so the status file is read instead.
    if STATUS.exists():
        kilobytes = next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
