import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from fastmae.runtime.ending import STOP_SIGNALS
from fastmae.training import stopping
from fastmae.training.stopping import BreakOff, StopRequest, Vote


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_becomes_a_request_and_its_handler_is_restored(number):
    handler = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) is handler


def test_a_signal_from_before_the_training_stops_it_too(monkeypatch):
    monkeypatch.setattr(stopping, "is_requested", lambda: True)
    with StopRequest() as stop:
        assert stop.requested
        with pytest.raises(BreakOff), stop.breaks_off(at_once=True):
            raise AssertionError


def test_another_thread_than_the_main_one_trains_without_signals():
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]

    def train() -> bool:
        with StopRequest() as stop:
            return stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(train).result()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_a_schedulers_second_signal_does_not_interrupt():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_a_single_process_decides_after_every_step(fabric):
    vote = Vote(fabric)
    assert vote.after_step(stop=False, save=False) == (False, False)
    assert vote.after_step(stop=True, save=False) == (True, False)
    assert vote.after_step(stop=False, save=True) == (False, True)


class Processes:
    """A stand-in for Fabric with two processes that take equally long; the other one may want to stop."""

    world_size, device, other_wants_to_stop = 2, "cpu", False

    def __init__(self):
        self.votes = 0

    def all_reduce(self, vote, reduce_op):
        assert reduce_op == "sum"
        self.votes += 1
        stop, save, seconds = vote.tolist()
        return SimpleNamespace(tolist=lambda: [stop + self.other_wants_to_stop, save, 2 * seconds])


@pytest.fixture
def clock(monkeypatch):
    """The time that votes are taken by: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize(("seconds_per_step", "steps_per_vote"), [(0.1, 10), (0.4, 2), (3.0, 1)])
def test_several_processes_vote_about_once_a_second_but_at_most_after_every_step(
    seconds_per_step, steps_per_vote, clock
):
    processes = Processes()
    vote = Vote(processes)

    def votes_in(steps):
        before = processes.votes
        for _ in range(steps):
            clock.now += seconds_per_step
            vote.after_step(stop=False, save=False)
        return processes.votes - before

    votes_in(40)  # the interval grows from one step
    assert votes_in(20 * steps_per_vote) == pytest.approx(20, abs=2)


def test_after_fast_steps_the_interval_between_votes_doubles_at_most(clock):
    processes = Processes()
    vote, voted_at = Vote(processes), []
    for step in range(1, 20):
        clock.now += 1e-6
        before = processes.votes
        vote.after_step(stop=False, save=False)
        voted_at += [step] if processes.votes > before else []
    assert voted_at == [1, 3, 7, 15]


def test_one_processs_wish_to_stop_reaches_all_at_the_next_vote(clock):
    processes = Processes()
    vote = Vote(processes)
    clock.now += 0.5
    assert vote.after_step(stop=False, save=True) == (False, True)
    processes.other_wants_to_stop = True
    steps = 1
    while not vote.after_step(stop=False, save=False)[0]:
        clock.now += 0.5
        steps += 1
    assert steps <= 2
