"""The processes of one run end together: if one is lost, one line says so, and no other process is left hanging."""

import atexit
import contextlib
import functools
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from fastmae.errors import FailedCheckError, InputError, InterruptedRunError, first_line
from fastmae.runtime.ending import ends_at_once, is_requested, leave_children_to
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.heartbeat import Heartbeat

log = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

GRACE = 20.0
"""Seconds that a process gets to end by itself once another one has ended: after a signal or on bad input, all do."""
GRACE_AFTER_A_SIGNAL = 2.0
"""The same after a signal: what is to be saved is saved, and closing connections may take a process very long."""
CONTINUES = "saved work is kept, and the same call continues from it"
_started: list[subprocess.Popen[bytes]] = []
_heartbeats: list[Heartbeat] = []
_ending = threading.Lock()
"""Held by the thread that ends this process, so that one line is written."""


def connect(fabric: Fabric) -> None:
    """Start the processes that `--devices` asks for, and connect all. A signal meanwhile ends those at once.

    An error of NCCL shall not abort this process with a stack trace: the heartbeat reads NCCL's errors and reports them
    instead, which it can since torch 2.7.
    """
    if hasattr(getattr(dist, "ProcessGroupNCCL", None), "get_error"):
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")

    def kill_started() -> None:
        for process in _of_launcher(fabric):
            process.kill()

    leave_children_to(kill_started)
    with ends_at_once():
        fabric.launch()


def _of_launcher(fabric: Fabric) -> list[subprocess.Popen[bytes]]:
    """The processes that Fabric has started and watches itself."""
    started: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    return started


def watch_peers(fabric: Fabric) -> None:
    """Watch all processes by their heartbeats, and those that Fabric has started for `--devices` directly too.

    At exit, the connections are closed and the started processes ended.

    This replaces Fabric's own observer, which checks every five seconds and ends this process by SIGKILL, without a
    message, even if all processes are about to end by themselves. The observer stops once its list of processes is
    empty.
    """
    if fabric.world_size == 1:
        return
    heartbeat = Heartbeat(fabric.global_rank, fabric.world_size, _lost, failure=_communication_failure)
    heartbeat.start()
    _heartbeats.append(heartbeat)
    started = _of_launcher(fabric)
    if started:
        _started.extend(started)
        started.clear()
        threading.Thread(target=_watch, daemon=True).start()
        atexit.register(_end_started)
        leave_children_to(_kill_started)
    if dist.get_backend() == "gloo":  # Fabric closes NCCL's connections itself
        atexit.register(_disconnect)  # runs before `_end_started`, since the started processes may wait for this one


def ends_with_its_peers(function: Callable[P, Result]) -> Callable[P, Result]:
    """For a function that runs in several processes: a collective that fails because a peer is gone becomes one line.

    Raises:
        InputError: the peer has ended with code 2, after reporting the reason.
        FailedCheckError: the peer failed in another way, was killed, or can't be reached.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            with _lost_peers_reported():
                return function(*args, **kwargs)
        except Exception as error:
            if dist.is_available() and dist.is_initialized():
                code = 130 if isinstance(error, InterruptedRunError) else 2 if isinstance(error, InputError) else 1
                atexit.register(_exit_in_any_case, code)
            raise
        finally:
            while _heartbeats:
                _heartbeats.pop().stop()

    return wrapped


@contextlib.contextmanager
def _lost_peers_reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _lost_a_peer(error):
            raise
        failed = _first_failed(GRACE)
        if failed is None:
            cause = f"another process of this run has ended or can't be reached ({first_line(error)})"
            raise FailedCheckError(f"{cause}; {CONTINUES}") from None
        raise (InputError if failed.returncode == 2 else FailedCheckError)(_fate(failed)) from None


def _lost_a_peer(error: RuntimeError) -> bool:
    connected = dist.is_available() and dist.is_initialized()
    return connected and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def _first_failed(seconds: float) -> subprocess.Popen[bytes] | None:
    """A started process that has failed or fails within so many seconds; None if none does."""
    end = time.monotonic() + seconds
    while True:
        failed = next((process for process in _started if process.poll()), None)
        if failed is not None or not _started or time.monotonic() > end:
            return failed
        time.sleep(0.05)


def _watch() -> None:
    """Once a started process has failed, end the others and this one: they may wait in a collective that never ends."""
    while (failed := _first_failed(1.0)) is None:
        if all(process.returncode == 0 for process in _started):
            return
    time.sleep(GRACE)
    _end(_fate(failed), 2 if failed.returncode == 2 else 1)


def _lost(line: str) -> None:
    """A process is gone, and this one may wait for it without an end."""
    failed = _first_failed(GRACE / 4)  # which may have reported why
    if failed is None:
        _end(f"{line}; {CONTINUES}", 1)
    else:
        _end(_fate(failed), 2 if failed.returncode == 2 else 1)


def _end(line: str, code: int) -> None:
    _ending.acquire()
    log.warning(f"fastmae: {line}")
    _kill_started()
    os._exit(code)


def _kill_started() -> None:
    for process in _started:
        process.kill()


def _communication_failure() -> str:
    """A line about an error that NCCL has met, or ''."""
    for group in list(getattr(dist.distributed_c10d._world, "pg_map", ())):
        backend: Any = group._get_backend(torch.device("cuda")) if dist.get_backend(group) == "nccl" else None
        error = backend.get_error().name if hasattr(backend, "get_error") else "SUCCESS"
        if error != "SUCCESS":
            return f"NCCL has failed ({error.lower()}): another process has ended or can't be reached"
    return ""


def _exit_in_any_case(code: int) -> None:
    """At exit after a failure, don't wait long: to close its connections, NCCL may wait for peers that don't come."""
    timer = threading.Timer(1.5 * GRACE, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _disconnect() -> None:
    if dist.is_initialized():  # an earlier launch may have registered this function too
        dist.destroy_process_group()


def _end_started() -> None:
    end = time.monotonic() + (GRACE_AFTER_A_SIGNAL if is_requested() else GRACE)
    for process in _started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _fate(failed: subprocess.Popen[bytes]) -> str:
    name = f"process {_started.index(failed) + 2} of {len(_started) + 1} on this machine"
    code = failed.returncode
    if code < 0:
        return f"{name} was killed (signal {-code}; out of memory?); {CONTINUES}"
    return f"{name} has ended with code {code} and reported why; {CONTINUES}"
