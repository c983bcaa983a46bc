import socket
import threading

import pytest
import torch.distributed as dist

from fastmae.runtime.heartbeat import Heartbeat

INTERVAL, PATIENCE = 0.02, 40


@pytest.fixture
def store():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


class Process:
    """A process's heartbeat, and what it has reported."""

    def __init__(self, rank, connect, world_size=3, **options):
        self.lines, self.reported = [], threading.Event()
        self.heartbeat = Heartbeat(
            rank, world_size, self.note, connect, interval=INTERVAL, patience=PATIENCE, **options
        )
        self.heartbeat.start()

    def note(self, line):
        self.lines.append(line)
        self.reported.set()

    def is_seen_by(self, other):
        """Wait until another process has heard of this one twice, so that it watches it."""
        for _ in range(500):
            if self.heartbeat.rank in other.heartbeat.silence:
                return True
            threading.Event().wait(INTERVAL)
        return False


@pytest.fixture
def processes(store):
    """Three processes that have heard of each other."""

    def connect():
        return dist.TCPStore("localhost", store.port, is_master=False, wait_for_workers=False)

    three = [Process(rank, connect) for rank in range(3)]
    assert all(three[rank].is_seen_by(three[0]) and three[0].is_seen_by(three[rank]) for rank in (1, 2))
    yield three
    for process in three:
        process.heartbeat.stop()


def test_nobody_is_lost_while_all_are_alive_and_after_all_have_left(processes):
    threading.Event().wait(1.5 * PATIENCE * INTERVAL)
    for process in processes:
        process.heartbeat.stop()
    threading.Event().wait(1.5 * PATIENCE * INTERVAL)
    assert [process.lines for process in processes] == [[], [], []]


def test_all_others_name_the_process_that_is_silent(processes):
    processes[1].heartbeat.stop()
    for rank in (0, 2):
        assert processes[rank].reported.wait(5)
        assert processes[rank].lines[0].startswith(f"process 2 of 3 (on {socket.gethostname()}) has not been heard of")
    assert not processes[1].lines


def test_the_silence_of_the_first_process_is_noticed_by_all_others(processes):
    processes[0].heartbeat.stop()
    for rank in (1, 2):
        assert processes[rank].reported.wait(5)
        assert processes[rank].lines[0].startswith("process 1 of 3 ")


def test_a_process_that_begins_late_is_not_lost(store):
    first = Process(0, lambda: store, world_size=2)
    threading.Event().wait(1.5 * PATIENCE * INTERVAL)
    assert not first.lines
    second = Process(1, lambda: store, world_size=2)
    assert second.is_seen_by(first)
    second.heartbeat.stop()
    assert first.reported.wait(5)
    first.heartbeat.stop()


def test_a_store_that_no_longer_answers_counts_as_silence_of_the_first_process():
    class Hanging(dist.HashStore):
        calls = 0

        def add(self, key, amount):
            self.calls += 1
            if self.calls > 10:
                threading.Event().wait(5)
            return self.calls

    process = Process(1, Hanging)
    assert process.reported.wait(4)
    assert process.lines[0].startswith("process 1 of 3 has not been heard of")
    process.heartbeat.stop()


def test_a_failure_of_the_communication_is_reported_by_the_process_itself_and_seen_as_silence(store):
    failures = [""]
    first = Process(0, lambda: store, world_size=2)
    second = Process(1, lambda: store, world_size=2, failure=lambda: failures[0])
    assert second.is_seen_by(first)
    failures[0] = "NCCL has failed"
    assert second.reported.wait(5)
    assert second.lines == ["NCCL has failed"]
    assert first.reported.wait(5)
    assert first.lines[0].startswith("process 2 of 2 ")
    first.heartbeat.stop()
    second.heartbeat.stop()
