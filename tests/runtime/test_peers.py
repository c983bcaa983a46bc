import subprocess
import sys

import pytest
import torch.distributed as dist

from fastmae.errors import FailedCheckError, InputError
from fastmae.runtime import peers

LOST = "[/build/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:897: Connection reset by peer"


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def started(monkeypatch):
    """Processes that this one has started, with the code that each ends with; None: it does not end."""
    processes = []
    monkeypatch.setattr(peers, "_started", processes)

    def start(*codes):
        for code in codes:
            ending = (
                "time.sleep(60)"
                if code is None
                else f"os._exit({code})"
                if code >= 0
                else f"os.kill(os.getpid(), {-code})"
            )
            processes.append(subprocess.Popen([sys.executable, "-c", f"import os, time; {ending}"]))

    yield start
    for process in processes:
        process.kill()
        process.wait()


@peers.ends_with_its_peers
def collective(message):
    raise RuntimeError(message)


def test_a_lost_connection_is_one_line_that_keeps_the_cause(group):
    with pytest.raises(
        FailedCheckError,
        match=r"another process of this run has ended.*Connection reset by peer.*the same call continues",
    ):
        collective(LOST)


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (-9, FailedCheckError, r"process 3 of 3 on this machine was killed \(signal 9; out of memory\?\)"),
        (2, InputError, "process 3 of 3 on this machine has ended with code 2, and said why"),
        (1, FailedCheckError, "process 3 of 3 on this machine has ended with code 1, and said why"),
    ],
)
def test_what_became_of_a_process_that_was_started_here_is_told(group, started, code, kind, says):
    started(None, code)
    with pytest.raises(kind, match=says):
        collective(LOST)


def test_another_error_is_left_as_it_is(group):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        collective("mat1 and mat2 shapes cannot be multiplied")


def test_a_process_alone_has_no_peers_to_lose():
    with pytest.raises(RuntimeError, match=r"pair\.cc"):
        collective(LOST)


def test_at_exit_none_is_left_behind(started, monkeypatch):
    monkeypatch.setattr(peers, "GRACE", 3)
    started(0, None)
    peers._end_started()
    assert [process.wait(10) for process in peers._started] == [0, -9]


def test_what_hangs_while_another_has_failed_is_ended_and_says_so():
    script = """
import subprocess, sys, threading, time
from fastmae.runtime import peers
peers.GRACE = 0.3
peers._started.append(subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]))
threading.Thread(target=peers._watch, daemon=True).start()
time.sleep(60)
"""
    hung = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=50)
    assert hung.returncode == 1
    assert (
        hung.stderr
        == f"fastmae: process 2 of 2 on this machine was killed (signal 9; out of memory?); {peers.CONTINUES}\n"
    )
