import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fastmae.errors import FailedCheckError, InputError
from fastmae.runtime import heartbeat, peers

LOST_CONNECTION = "[/build/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:897: Connection reset by peer"


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def start(monkeypatch):
    """Starts one process per exit code: negative, it ends by that signal; None, it does not end."""
    processes = []
    monkeypatch.setattr(peers, "_started", processes)

    def start(*codes):
        for code in codes:
            if code is None:
                statement = "time.sleep(60)"
            elif code >= 0:
                statement = f"os._exit({code})"
            else:
                statement = f"os.kill(os.getpid(), {-code})"
            processes.append(subprocess.Popen([sys.executable, "-c", f"import os, time; {statement}"]))

    yield start
    for process in processes:
        process.kill()
        process.wait()


@peers.ends_with_its_peers
def collective(message):
    raise RuntimeError(message)


def test_a_lost_connection_becomes_one_line_that_keeps_the_cause(group):
    with pytest.raises(FailedCheckError, match="Connection reset by peer") as caught:
        collective(LOST_CONNECTION)
    assert peers.CONTINUES in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "error", "fate"),
    [(-9, FailedCheckError, "signal 9"), (2, InputError, "code 2"), (1, FailedCheckError, "code 1")],
)
def test_the_message_names_the_started_process_that_failed_and_how(group, start, code, error, fate):
    start(None, code)
    with pytest.raises(error, match=rf"process 3 of 3 .*{fate}"):
        collective(LOST_CONNECTION)


def test_any_other_error_is_passed_on(group):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        collective("mat1 and mat2 shapes cannot be multiplied")


def test_a_single_process_has_no_peers_to_lose():
    with pytest.raises(RuntimeError, match=r"pair\.cc"):
        collective(LOST_CONNECTION)


def test_no_process_is_left_at_exit(start, monkeypatch):
    monkeypatch.setattr(peers, "GRACE", 3)
    start(0, None)
    peers._end_started()
    assert [process.wait(10) for process in peers._started] == [0, -9]


@pytest.mark.slow
def test_a_process_that_hangs_after_a_peer_has_failed_is_ended_with_a_message():
    script = """
import subprocess, sys, threading, time
from fastmae.runtime import heartbeat, peers
peers.GRACE = 0.3
peers._started.append(subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]))
threading.Thread(target=peers._watch, daemon=True).start()
time.sleep(60)
"""
    hung = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=50)
    assert hung.returncode == 1
    assert hung.stderr.startswith("fastmae: process 2 of 2")
    assert hung.stderr.endswith(f"{peers.CONTINUES}\n")
    assert hung.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_process_that_has_failed_ends_even_if_its_connections_do_not_close():
    script = """
import atexit, time
import torch.distributed as dist
from fastmae.errors import InputError
from fastmae.runtime import peers

peers.GRACE = 0.3
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(time.sleep, 60)


@peers.ends_with_its_peers
def run():
    raise InputError("an image is damaged")


try:
    run()
except InputError as error:
    print(error)
"""
    failed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=50)
    assert (failed.returncode, failed.stdout) == (2, "an image is damaged\n"), failed.stderr


@pytest.mark.parametrize(("codes", "code", "line"), [((), 1, "process 2 is silent"), ((None, 2), 2, "process 3 of 3")])
def test_a_lost_heartbeat_ends_the_process_after_what_a_started_one_has_reported(
    codes, code, line, start, monkeypatch, caplog
):
    monkeypatch.setattr(peers, "_ending", threading.Lock())
    monkeypatch.setattr(os, "_exit", sys.exit)
    start(*codes)
    with pytest.raises(SystemExit) as ended:
        peers._lost("process 2 is silent")
    assert ended.value.code == code
    assert caplog.messages[-1].startswith(f"fastmae: {line}")
    assert caplog.messages[-1].endswith(peers.CONTINUES)


class Group:
    """A process group whose backend reports an error, or is older than torch 2.7 and reports none."""

    def __init__(self, error):
        self.error = error

    def _get_backend(self, device):
        assert device.type == "cuda"
        if self.error is None:
            return SimpleNamespace()
        return SimpleNamespace(get_error=lambda: SimpleNamespace(name=self.error))


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        (["SUCCESS", "REMOTE_ERROR"], "NCCL has failed (remote_error): another process has ended or can't be reached"),
        (["SUCCESS", None], ""),
    ],
)
def test_an_error_of_nccl_in_any_group_is_noticed(errors, line, monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "_pg_map", {Group(error): ("nccl", None) for error in errors})
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    assert peers._communication_failure() == line


def test_nccl_does_not_abort_the_process_if_its_errors_can_be_read(monkeypatch):
    variable = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(), raising=False)
    connected = []
    unconnected = SimpleNamespace(launch=lambda: connected.append(variable in os.environ))
    peers.connect(unconnected)
    assert variable not in os.environ
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(get_error=None), raising=False)
    peers.connect(unconnected)
    assert os.environ[variable] == "0"
    assert connected == [False, True]  # it was set before


def test_gloo_reports_its_errors_itself(group):
    assert peers._communication_failure() == ""


COLLECTIVE_WITHOUT_END = """
import functools, time
from fastmae.runtime import heartbeat, peers
from fastmae.runtime.launch import launch

peers.Heartbeat = functools.partial(heartbeat.Heartbeat, interval=0.1, patience=20)


@peers.ends_with_its_peers
def run():
    launch("cpu", "32-true", 1, seed=0)
    print("connected", flush=True)
    time.sleep(60)  # as in a collective of NCCL, which returns no error when a peer is lost


run()
"""


def test_the_default_patience_is_well_within_a_minute():
    assert heartbeat.INTERVAL * heartbeat.PATIENCE + peers.GRACE < 55


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_waits_for_a_lost_one_without_an_end_is_ended_with_one_line(lost, number):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank}
        arguments = [sys.executable, "-c", COLLECTIVE_WITHOUT_END]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(arguments, env=environment, text=True, **pipes))
    try:
        assert [process.stdout.readline() for process in processes] == ["connected\n"] * 2
        time.sleep(0.5)  # some beats
        processes[lost].send_signal(number)
        _, errors = processes[1 - lost].communicate(timeout=30)
        assert processes[1 - lost].returncode == 1, errors
        lines = [line for line in errors.splitlines() if line.startswith("fastmae: ")]
        assert len(lines) == 1, errors
        assert lines[0].startswith(f"fastmae: process {lost + 1} of 2 ")
        assert lines[0].endswith(peers.CONTINUES)
        assert "Traceback" not in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
