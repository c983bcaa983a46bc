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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastmae import cli
from fastmae.config.commands import COMMANDS


class Forks:
    """Starts commands; each runs in a session of its own, so that its loading processes can be killed too.

    Args:
        warm: the process that forks.
    """

    def __init__(self, warm: "subprocess.Popen[str]"):
        self.warm = warm

    def start(self, args: list[str], log: Path) -> int:
        """Start a command. What it prints is appended to `log`; returns its process number."""
        return self._ask({"args": args, "log": str(log)})

    def wait(self, pid: int) -> int:
        """The exit code of a command; -9 if it was killed."""
        return self._ask({"wait": pid})

    def run(self, args: list[str], log: Path) -> None:
        """Run a command, which must succeed."""
        code = self.wait(self.start(args, log))
        assert code == 0, log.read_text(errors="replace")[-3000:]

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.warm.stdin is not None and self.warm.stdout is not None
        self.warm.stdin.write(json.dumps(request) + "\n")
        self.warm.stdin.flush()
        return int(json.loads(self.warm.stdout.readline()))


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
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork() or work(**request)
        print(answer, file=answers, flush=True)


def work(args: list[str], log: str) -> NoReturn:
    """In the fork: be the command."""
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main(args)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
