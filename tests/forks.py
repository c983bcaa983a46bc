"""Commands in processes of their own that start at once: forks of a process that has imported everything beforehand.

`python forks.py` is that process: for each request on standard input, one JSON value a line, it answers with one. It
must never compute anything itself, since threads would not survive a fork.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastmae import cli
from fastmae.config.commands import COMMANDS


@dataclass
class Fork:
    """A command that was started. It leads a session of its own, to which its loading processes belong too.

    Attributes:
        warm: the process that has started it.
        pid: its number, which is no other process's until its end has been asked for.
        log: what it prints.
    """

    warm: "Forks"
    pid: int
    log: Path

    def poll(self) -> int | None:
        """The exit code, -9 if it was killed; None while it runs."""
        return self.warm.ask({"poll": self.pid})

    def wait(self, seconds: float = 250) -> int:
        """The exit code, once it has ended."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"it still runs; so far: {self.output()}"
            time.sleep(0.01)
        return code

    def finish(self) -> str:
        """What it has printed, once it has ended with exit code 0."""
        code = self.wait()
        assert code == 0, self.output()
        return self.output()

    def output(self) -> str:
        """The end of what it has printed so far, on both streams."""
        return self.log.read_text(errors="replace")[-10_000:]


class Forks:
    """Starts commands.

    Args:
        warm: the process that forks.
    """

    def __init__(self, warm: "subprocess.Popen[str]"):
        self.warm = warm

    def start(self, args: list[str], log: Path, variables: dict[str, str] | None = None) -> Fork:
        """Start a command. What it prints is appended to `log`; `variables` are added to its environment."""
        pid = self.ask({"args": args, "log": str(log), "variables": variables or {}})
        assert pid is not None
        return Fork(self, pid, log)

    def ask(self, request: dict[str, Any]) -> int | None:
        assert self.warm.stdin is not None and self.warm.stdout is not None
        self.warm.stdin.write(json.dumps(request) + "\n")
        self.warm.stdin.flush()
        answer: int | None = json.loads(self.warm.stdout.readline())
        return answer


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """The process that forks, which takes as long to start as any command does."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as warm:
        assert warm.stdout is not None
        warm.stdout.readline()  # it is ready
        yield Forks(warm)
        warm.kill()


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for command in COMMANDS.values():
        command.load()
    print("null", file=answers, flush=True)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = exit_code(request["poll"], ended) if "poll" in request else os.fork() or work(**request)
        print(json.dumps(answer), file=answers, flush=True)


def exit_code(pid: int, ended: dict[int, int]) -> int | None:
    """Of a fork; None while it runs. `ended` holds the codes of those that were waited for."""
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended.get(pid)


def work(args: list[str], log: str, variables: dict[str, str]) -> NoReturn:
    """In the fork: be the command."""
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(variables)
        cli.main(args)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
