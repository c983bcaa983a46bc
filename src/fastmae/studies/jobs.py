"""Several jobs at once, each in a worker process with its share of the CPU's threads.

A failing job does not touch the others. Ctrl-C and a scheduler's signals stop all workers, which save their runs first.
"""

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmae.errors import InterruptedRunError
from fastmae.outside.documents import parse_json
from fastmae.runtime.device import cores
from fastmae.runtime.ending import leave_children_to, unlimited
from fastmae.runtime.workers import CORES_LEFT
from fastmae.studies.worker import CRASHED, DONE
from fastmae.training.stopping import StopRequest

# Not `-m`: that would put the working directory on the path, and with it any file that is called like a module.
COMMAND = "import sys; sys.path = [p for p in sys.path if p]; from fastmae.studies.worker import main; main()"
POLL_SECONDS = 0.2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A job for a worker.

    Attributes:
        name: for messages.
        file: its description, JSON; the log and the results go beside it.
        seconds: how long it will take, as far as is known.
        about: what the study needs to know when it is done.
    """

    name: str
    file: Path
    seconds: float
    about: Any = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: one of the codes of `worker`, and a line about a failure."""

    code: int
    message: str


class Worker:
    """A worker process.

    Args:
        threads: CPU threads of its computations.
    """

    def __init__(self, threads: int):
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        command = [sys.executable, "-c", COMMAND]
        # A session of its own: Ctrl-C reaches the study alone, which tells its workers once.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, text=True
        )

    def start(self, job: Job, outcomes: "queue.SimpleQueue[tuple[Worker, Outcome]]") -> None:
        """Give it a job; its outcome is put into the queue."""
        threading.Thread(target=lambda: outcomes.put((self, self._do(job))), daemon=True).start()

    def _do(self, job: Job) -> Outcome:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{job.file}\n")
            self.process.stdin.flush()
        has_ended = False
        # Its loading processes hold the other end of the pipe too, so its own end alone would not end the reading.
        while not select.select([self.process.stdout], [], [], 0 if has_ended else POLL_SECONDS)[0] and not has_ended:
            has_ended = self.process.poll() is not None
        answer = "" if has_ended else self.process.stdout.readline()
        if answer:
            return parse_json(answer, Outcome, name="a worker", way_out="give the command of the study again")
        code = self.process.wait()
        self._end_loading_processes()
        cause = f"killed by signal {-code}, out of memory?" if code < 0 else f"exit code {code}"
        return Outcome(CRASHED, f"the process ended ({cause})")

    def stop(self) -> None:
        """Make it save its run and end."""
        if self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """Wait for its end. An idle worker ends when its standard input does."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        self._end_loading_processes()

    def kill(self) -> None:
        """End it and its loading processes at once."""
        if self.process.poll() is None:
            self._end_loading_processes()

    def _end_loading_processes(self) -> None:
        """Of a worker that was killed; they are alone in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def run_jobs(
    workers: "Workers",
    jobs: Sequence[Job],
    finished: Callable[[Job, Outcome], Sequence[Job]],
    started: Callable[[Job], object] = lambda _: None,
    idle: Callable[[], object] = lambda: None,
) -> None:
    """Do the jobs, and those that come out of them. The workers are then free for others; after a failure, they end.

    Args:
        workers: who does them.
        jobs: the first ones, in their order.
        finished: called with each job's outcome; gives further jobs, which come next.
        started: called when a job begins.
        idle: called now and then while jobs run.

    Raises:
        InterruptedRunError: after a signal, when all workers have saved.
    """
    waiting, running, interrupted = deque(jobs), dict[Worker, Job](), False
    with StopRequest() as stop, unlimited(), contextlib.ExitStack() as on_failure:
        on_failure.callback(workers.close)
        while running or (waiting and not stop.requested):
            while waiting and len(running) < workers.at_once and not stop.requested:
                job = waiting.popleft()
                started(job)
                running[workers.start(job)] = job
            ended = workers.next_outcome()
            if ended is not None:
                worker, outcome = ended
                job = running.pop(worker)
                if stop.requested and outcome.code != DONE:
                    interrupted = True
                else:
                    waiting.extendleft(reversed(finished(job, outcome)))
                continue
            idle()
            if stop.requested:
                workers.stop()
        if interrupted or waiting:
            raise InterruptedRunError("stopped, and saved; the same call continues")
        on_failure.pop_all()


class Workers:
    """Worker processes, started when they are needed.

    Args:
        at_once: how many there are at most.
        threads: CPU threads of each. Default: its share of the cores.
    """

    def __init__(self, at_once: int, threads: int | None = None):
        self.at_once, self.threads = at_once, threads or threads_of_a_job(at_once)
        self.all: list[Worker] = []
        self.free: list[Worker] = []
        self.outcomes: queue.SimpleQueue[tuple[Worker, Outcome]] = queue.SimpleQueue()
        leave_children_to(self.kill)

    def start(self, job: Job) -> Worker:
        """Give a job to a free worker, or to a new one."""
        if not self.free:
            self.free.append(Worker(self.threads))
            self.all.append(self.free[-1])
        worker = self.free.pop()
        worker.start(job, self.outcomes)
        return worker

    def next_outcome(self) -> tuple[Worker, Outcome] | None:
        """The outcome of a job that has ended; None if none does within a moment."""
        try:
            worker, outcome = self.outcomes.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return None
        if outcome.code < CRASHED:
            self.free.append(worker)
        return worker, outcome

    def stop(self) -> None:
        """Make those that are at work save and end."""
        for worker in self.all:
            if worker not in self.free:
                worker.stop()

    def kill(self) -> None:
        """End all at once."""
        for worker in self.all:
            worker.kill()

    def close(self) -> None:
        """End all; those that are at work save first."""
        self.stop()
        while self.all:
            self.all.pop().close()
        self.free.clear()


def threads_of_a_job(at_once: int) -> int:
    """CPU threads of each of several jobs; fewer if OMP_NUM_THREADS says so."""
    share = max(1, cores() // at_once)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdigit() and int(given) else share


def loading_workers(workers: int, at_once: int) -> int:
    """`--workers` of each of several jobs: -1 is its share of the cores but `CORES_LEFT`, at least 1."""
    return workers if workers >= 0 else max(1, cores() // at_once - CORES_LEFT)
