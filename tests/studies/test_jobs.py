"""Each job's share of the machine."""

from fastmae.runtime.device import cores
from fastmae.studies.jobs import loading_workers, threads_of_a_job


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
