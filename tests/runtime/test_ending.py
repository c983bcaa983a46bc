"""A signal ends a command within seconds, whatever it does. Each case is a fork of this one, where torch is loaded."""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastmae import cli
from fastmae.config.commands import COMMANDS, Command
from fastmae.runtime import ending
from fastmae.runtime.ending import STOP_SIGNALS
from fastmae.runtime.workers import as_is, batches

pytestmark = pytest.mark.promise("signals")

CPU = torch.device("cpu")


class Ended(NamedTuple):
    code: int
    err: str
    seconds: float


@pytest.fixture
def signalled(monkeypatch, tmp_path):
    """(what a command does, signal) -> how the command ends that gets the signal meanwhile.

    What it does is a function that takes `ready`, which it calls when the signal may come.
    """

    def run(work, number=signal.SIGTERM, limit=1.0):
        reader, writer = os.pipe()
        monkeypatch.setattr(ending, "LIMIT", limit)
        monkeypatch.setattr(Command, "load", lambda _: lambda _: work(lambda: os.write(writer, b"r")))
        err = tmp_path / "err"
        child = os.fork()
        if child == 0:
            call_command(err)
        assert select.select([reader], [], [], 60)[0]
        os.kill(child, number)
        start = time.monotonic()
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() - start > 30:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        os.close(reader)
        os.close(writer)
        children.append(child)
        return Ended(os.waitstatus_to_exitcode(ended[1]), err.read_text(), time.monotonic() - start)

    children = []
    yield run
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has left behind


def call_command(err: Path) -> None:
    """In the child: `fastmae recipes`, which does what the test says."""
    os.setpgid(0, 0)
    file = err.open("w", buffering=1)
    os.dup2(file.fileno(), 2)
    sys.stderr = file
    code = 99
    try:
        cli.main(["recipes"])
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def sleeps(ready):
    ready()
    time.sleep(60)


def computes_without_python(ready):
    """A call that goes on when a signal comes, as an operation of torch does."""
    calls = [ready, *9 * [partial(ctypes.CDLL(None).sleep, 10)]]
    while calls:
        with contextlib.suppress(BaseException):
            calls.pop(0)()


def turns_the_interruption_into_an_error_of_its_own(ready):
    try:
        sleeps(ready)
    except KeyboardInterrupt:
        raise RuntimeError("import failed") from None


class Endless(torch.utils.data.Dataset):
    """Its first batch never comes, and its process does not end by itself."""

    def __getitem__(self, _):
        while True:
            time.sleep(60)


def waits_for_a_loading_process(ready):
    loaded = batches(Endless(), CPU, 1, sampler=[0], collate=as_is)
    ready()
    next(loaded)


@pytest.mark.promise("signals")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_one_line_and_code_130(number, signalled):
    ended = signalled(sleeps, number)
    assert (ended.code, ended.err) == (130, "fastmae recipes: interrupted\n")
    assert ended.seconds < 10


@pytest.mark.promise("signals")
@pytest.mark.parametrize(
    "work",
    [computes_without_python, turns_the_interruption_into_an_error_of_its_own, waits_for_a_loading_process],
)
def test_whatever_a_command_does_it_ends_in_time(work, signalled):
    ended = signalled(work)
    assert (ended.code, ended.err) == (130, "fastmae recipes: interrupted\n")
    assert ended.seconds < 10


class EndsSlowly:
    """Python drops an exception in its finalizer."""

    def __init__(self, ready):
        self.ready = ready

    def __del__(self):
        self.ready()
        time.sleep(5)


def finalizes(ready):
    EndsSlowly(ready)
    time.sleep(60)


def drops_the_interruption(ready):
    """As libraries do that try an import and catch everything."""
    with contextlib.suppress(BaseException):
        sleeps(ready)
    time.sleep(60)


@pytest.mark.promise("signals")
@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("work", [finalizes, drops_the_interruption])
def test_an_interruption_that_was_dropped_comes_again(work, number, signalled, monkeypatch):
    monkeypatch.setattr(ending, "AGAIN", 0.5)
    ended = signalled(work, number, limit=20)
    assert (ended.code, ended.err) == (130, "fastmae recipes: interrupted\n")
    assert ended.seconds < 4


class HalfMade:
    """A signal comes while it is made; its finalizer then fails, as that of torch's loader does."""

    def __init__(self, ready):
        sleeps(ready)
        self.processes = []

    def __del__(self):
        assert self.processes == []


@pytest.mark.promise("signals")
def test_what_python_drops_because_of_the_end_is_not_shown(signalled):
    ended = signalled(HalfMade)
    assert (ended.code, ended.err) == (130, "fastmae recipes: interrupted\n")


@pytest.mark.promise("signals")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_may_end_at_once_does(number, signalled):
    def waits(ready):
        with ending.ends_at_once():
            computes_without_python(ready)

    ended = signalled(waits, number, limit=20)
    assert (ended.code, ended.err) == (130, "fastmae recipes: interrupted\n")
    assert ended.seconds < 4


@pytest.mark.promise("signals")
def test_no_loading_process_is_left_behind(signalled, tmp_path):
    def keeps_a_loading_process(ready):
        stubborn = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
        stubborn.start()
        (tmp_path / "pid").write_text(str(stubborn.pid))
        computes_without_python(ready)

    assert signalled(keeps_a_loading_process).code == 130
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.promise("signals")
def test_what_must_be_completed_is(signalled, tmp_path):
    def saves(ready):
        with ending.unlimited():
            with contextlib.suppress(KeyboardInterrupt):
                sleeps(ready)
            time.sleep(1.5)
            (tmp_path / "saved").touch()
        time.sleep(60)

    ended = signalled(saves, limit=0.5)
    assert (ended.code, ended.err) == (130, "fastmae recipes: interrupted\n")
    assert (tmp_path / "saved").exists()


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(signalled):
    def waits_a_moment(ready):
        ready()
        time.sleep(0.5)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert signalled(waits_a_moment, signal.SIGINT).code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handlers_are_for_the_process_of_a_command_alone():
    assert "recipes" in COMMANDS
    assert signal.getsignal(signal.SIGTERM) is not ending._interrupt
