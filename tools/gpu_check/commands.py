"""Runs fastmae's commands, several at once, each in a process of its own.

The processes are forked from one that has imported everything and computed nothing: starting Python and importing torch
twenty times over would take most of the check's time.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIMIT = 300.0
"""Seconds after which a command is taken to hang, and killed."""
POLL = 0.005


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        command: its arguments.
        code: its exit code; None if it had to be killed.
        result: its JSON; {} if there is none.
        said: the end of what it wrote to standard error.
        seconds: how long it took.
    """

    command: list[str]
    code: int | None
    result: dict[str, Any] = field(default_factory=dict)
    said: str = ""
    seconds: float = 0.0

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        last = self.said.strip().splitlines()[-1:]
        ended = f"no end after {LIMIT:.0f} s" if self.code is None else f"exit code {self.code}"
        return ": ".join([ended, *last])[:300]

    @property
    def details(self) -> str:
        """The command line and what it said."""
        return f"fastmae {' '.join(self.command)}\n{self.said}"

    @property
    def lacks_package(self) -> bool:
        """Whether it ended because a package of an extra is not installed."""
        return self.code == 2 and "pip install" in self.ending


class Commands:
    """Runs commands.

    Args:
        folder: for their output.
        at_once: most commands at the same time.
        threads: torch's threads on the CPU in each of them; 0: one per core.
    """

    def __init__(self, folder: Path, at_once: int, threads: int = 0):
        self.folder, self.threads = folder, threads
        self.numbers = itertools.count()
        self.pool = ThreadPoolExecutor(at_once)
        self.running: set[int] = set()
        # A start looks for children that have ended. If two threads do so at once, one of them finds no exit code.
        self.looking = threading.Lock()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["gpu_check.child"])
        folder.mkdir(parents=True, exist_ok=True)

    def submit(
        self,
        arguments: list[str],
        group: str = "",
        stop_when: Callable[[], bool] | None = None,
    ) -> Future[Outcome]:
        """Start a command as soon as there is room.

        Args:
            arguments: as on the command line; `--json` is added.
            group: 'ddp' or 'fsdp': its one process forms a group as several would (see `child.form_group`).
            stop_when: asked all the time; the first time that it says yes, the command gets a SIGTERM.
        """
        options = [group, self.threads]
        return self.pool.submit(self._run, "call", [*arguments, "--json"], options, stop_when)

    def run(self, arguments: list[str]) -> Outcome:
        """Run a command and wait for it."""
        return self.submit(arguments).result()

    def run_all(self, calls: Mapping[str, list[str]]) -> dict[str, Outcome]:
        """Run several commands at the same time, by name."""
        running = {name: self.submit(arguments) for name, arguments in calls.items()}
        return {name: future.result() for name, future in running.items()}

    def close(self) -> None:
        """Kill what still runs, which is nothing unless the check was interrupted."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(self.running):
            _kill(process)

    def imports(self) -> dict[str, str]:
        """Modules of fastmae that can't be imported, with the reason."""
        return self._run("tell_imports", ["imports"], []).result

    def _run(
        self,
        function: str,
        command: list[str],
        options: list[object],
        stop_when: Callable[[], bool] | None = None,
    ) -> Outcome:
        """Call a function of `child` in a process of its own; its arguments: the command, its output, the options."""
        output = self.folder / f"{next(self.numbers):03d}-{command[0]}"
        process = self.context.Process(target=_in_child, args=(function, command, str(output), *options))
        start = time.monotonic()
        with self.looking:
            process.start()
        number = process.pid or 0  # which only a process that was not started lacks
        self.running.add(number)
        while (code := self._exit_code(process)) is None and time.monotonic() - start < LIMIT:
            if stop_when is not None and stop_when():
                process.terminate()
                stop_when = None
            time.sleep(POLL)
        if code is None:
            _kill(number)
            with self.looking:
                process.join()
        self.running.discard(number)
        said = _text(output.with_suffix(".err"))[-3000:]
        return Outcome(command, code, _json(_text(output.with_suffix(".out"))), said, time.monotonic() - start)

    def _exit_code(self, process: BaseProcess) -> int | None:
        with self.looking:
            return process.exitcode


def _kill(process: int) -> None:
    """Kill a command with its loading processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _in_child(function: str, *arguments: object) -> None:
    os.setpgid(0, 0)
    child = importlib.import_module("gpu_check.child")  # imports all of fastmae, which this process need not
    getattr(child, function)(*arguments)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _json(output: str) -> dict[str, Any]:
    """The last line of a command's output, if it is a JSON object."""
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        content = json.loads(output.strip().splitlines()[-1])
        return content if isinstance(content, dict) else {}
    return {}
