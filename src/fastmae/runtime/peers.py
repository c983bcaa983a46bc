"""The processes of one run end together: where one is lost, a line says so, and nothing is left hanging."""

import atexit
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from fastmae.errors import FailedCheckError, InputError, first_line
from fastmae.runtime.fabric import Fabric

P = ParamSpec("P")
Result = TypeVar("Result")

GRACE = 20.0
"""Seconds that a process has to end by itself once another one has: all of them do, after a signal or on bad input."""
CONTINUES = "what was saved before is kept, and the same call continues"
_started: list[subprocess.Popen[bytes]] = []


def watch_peers(fabric: Fabric) -> None:
    """Keep an eye on the processes that Fabric has started for `--devices`; at exit, close the connections and leave none behind.

    In place of Fabric's own observer, which looks every five seconds and ends this process by SIGKILL, without a word and also where
    all are about to end by themselves. Its list of processes is empty after this, and with that it stops.
    """
    if fabric.world_size == 1:
        return
    started = getattr(fabric.strategy.launcher, "procs", [])
    if started:
        _started.extend(started)
        started.clear()
        threading.Thread(target=_watch, daemon=True).start()
        atexit.register(_end_started)
    if dist.get_backend() == "gloo":  # for NCCL Fabric does it
        atexit.register(_part)  # before the processes are waited for: they may wait for this one


def ends_with_its_peers(function: Callable[P, Result]) -> Callable[P, Result]:
    """For a function that runs in several processes: a collective that fails since another process is gone is one line.

    Raises:
        InputError: the other process has ended with code 2, and has said why.
        FailedCheckError: it was killed, or can't be reached any more.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not (
                dist.is_available()
                and dist.is_initialized()
                and (isinstance(error, dist.DistError) or "/gloo/" in str(error))
            ):
                raise
            failed = _first_failed(GRACE)
            if failed is None:
                raise FailedCheckError(
                    f"another process of this run has ended, or can't be reached any more ({first_line(error)}); {CONTINUES}"
                ) from None
            raise (InputError if failed.returncode == 2 else FailedCheckError)(_fate(failed)) from None

    return wrapped


def _first_failed(seconds: float) -> subprocess.Popen[bytes] | None:
    """One of the started processes that has failed, or does so within some seconds."""
    end = time.monotonic() + seconds
    while True:
        failed = next((process for process in _started if process.poll()), None)
        if failed is not None or not _started or time.monotonic() > end:
            return failed
        time.sleep(0.05)


def _watch() -> None:
    """End what hangs in a collective that can't come to an end."""
    while (failed := _first_failed(1.0)) is None:
        if all(process.returncode == 0 for process in _started):
            return
    time.sleep(GRACE)
    print(f"fastmae: {_fate(failed)}", file=sys.stderr, flush=True)
    for process in _started:
        process.kill()
    os._exit(2 if failed.returncode == 2 else 1)


def _part() -> None:
    if dist.is_initialized():  # not yet done by an earlier launch's
        dist.destroy_process_group()


def _end_started() -> None:
    end = time.monotonic() + GRACE
    for process in _started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _fate(failed: subprocess.Popen[bytes]) -> str:
    number = f"process {_started.index(failed) + 2} of {len(_started) + 1} on this machine"
    code = failed.returncode
    how = f"was killed (signal {-code}; out of memory?)" if code < 0 else f"has ended with code {code}, and said why"
    return f"{number} {how}; {CONTINUES}"
