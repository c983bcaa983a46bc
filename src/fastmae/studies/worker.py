"""A worker process of a study: takes the path of a job from standard input, does it, answers with one line of JSON.

It writes what it has to say into the log in the job's folder. If the study is gone (the end of standard input), it
saves its run and stops.
"""

import contextlib
import fcntl
import gc
import json
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from fastmae.config import PretrainConfig
from fastmae.errors import FailedCheckError, InputError, InterruptedRunError
from fastmae.outside.documents import read_json
from fastmae.pretraining.pretrain import pretrain
from fastmae.runtime import console
from fastmae.runtime.ending import heed_signals
from fastmae.studies.measure import train_and_measure
from fastmae.studies.speeds import measure_speeds

log = logging.getLogger(__name__)
DONE, FAILED_CHECK, BAD_INPUT, CRASHED, INTERRUPTED = 0, 1, 2, 3, 130
LOG_FILE = "log.txt"
LOCK_FILE = "lock"
SPEEDS, RUN, PRETRAIN = "speeds", "run", "pretrain"
KINDS: dict[str, Callable[[dict[str, Any], Path], object]] = {
    SPEEDS: measure_speeds,
    RUN: train_and_measure,
    PRETRAIN: lambda job, _: pretrain(PretrainConfig(**job["pretrain"])),
}


def main() -> None:
    """Do jobs until standard input ends."""
    # The standard streams are set free: what is printed goes to the log; and a process that is forked off closes
    # sys.stdin, which would wait for ever for the thread that reads it.
    questions, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    console.show()
    jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(questions, jobs), daemon=True).start()
    heed_signals()
    with contextlib.suppress(KeyboardInterrupt):  # while it waits for a job
        _do_jobs(jobs, answers)
    gc.freeze()  # as at the end of a command


def _do_jobs(jobs: "queue.SimpleQueue[str | None]", answers: TextIO) -> None:
    code = DONE
    while code in (DONE, FAILED_CHECK, BAD_INPUT) and (path := jobs.get()) is not None:
        code, message = _do(Path(path))
        with contextlib.suppress(BrokenPipeError):  # the study is gone
            answers.write(json.dumps({"code": code, "message": " ".join(message.split())}) + "\n")
            answers.flush()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other workers on the same GPU


def _read_jobs(questions: TextIO, jobs: "queue.SimpleQueue[str | None]") -> None:
    for line in questions:
        jobs.put(line.strip())
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGTERM)  # a run that trains saves itself; anything else can be done again


def _do(path: Path) -> tuple[int, str]:
    """Do one job. Its folder is locked: the worker of a study that was killed may not be done with saving yet."""
    folder = path.parent
    with (folder / LOG_FILE).open("ab") as file, (folder / LOCK_FILE).open("w") as lock:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            job: dict[str, Any] = read_json(path, dict[str, Any], way_out="give the command of the study again")
            KINDS[job["kind"]](job, folder)
            return DONE, ""
        except FailedCheckError as error:
            code, message = FAILED_CHECK, str(error)
        except (InputError, OSError) as error:
            code, message = BAD_INPUT, str(error)
        except (InterruptedRunError, KeyboardInterrupt) as error:
            code, message = INTERRUPTED, str(error)
        except Exception as error:
            log.exception("a defect:")
            code, message = CRASHED, f"{type(error).__name__}: {error}"
        log.error(message)
        return code, message
