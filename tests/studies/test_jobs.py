"""Progress over a whole study, and each job's share of the machine."""

from pathlib import Path

from fastmae.runtime.device import cores
from fastmae.studies import jobs
from fastmae.studies.jobs import Job, Progress, loading_workers, threads_of_a_job


def test_the_time_left_follows_the_jobs_that_are_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    progress = Progress(total=6, done=2, seconds=40.0, jobs=2)
    assert progress.seconds_left() == 20
    first = Job("a", Path("a/job.json"), 10.0)
    progress.begin(first)
    now[0] = 20.0  # twice as long as predicted
    progress.end(first, "")
    assert progress.done == 3
    assert progress.seconds_left() == 2 * 30 / 2


def test_jobs_share_the_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_of_a_job(1) == cores()
    assert threads_of_a_job(10 * cores()) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_of_a_job(1) == 1


def test_loading_processes_are_as_asked_for_or_the_rest_of_the_share():
    assert loading_workers(3, 4) == 3
    assert loading_workers(0, 4) == 0
    assert loading_workers(-1, 10 * cores()) == 1
