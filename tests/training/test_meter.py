from types import SimpleNamespace

import pytest
import torch

from fastmae.training import meter
from fastmae.training.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """The time that a meter reads: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter.time, "monotonic", lambda: clock.now)
    return clock


def add(meter, *losses):
    for loss in losses:
        meter.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(2 * loss)})


def test_the_means_are_over_the_steps_since_the_last_entry(fabric):
    scalars = Meter(fabric, {}, 0)
    add(scalars, 1.0, 2.0, 6.0)
    assert scalars.means() == {"loss": 3.0, "grad_norm": 6.0}
    scalars.restart(0.0)
    add(scalars, 5.0)
    assert scalars.means() == {"loss": 5.0, "grad_norm": 10.0}


def test_the_sums_of_an_earlier_call_count(fabric):
    earlier = Meter(fabric, {}, 0)
    add(earlier, 1.0, 2.0)
    continued = Meter(fabric, earlier.totals(), earlier.summed_steps)
    add(continued, 6.0)
    assert continued.means() == {"loss": 3.0, "grad_norm": 6.0}
    assert (continued.totals(), continued.summed_steps) == ({"loss": 9.0, "grad_norm": 18.0}, 3)


def test_a_meter_without_steps_has_no_totals(fabric):
    assert Meter(fabric, {}, 0).totals() == {}


def test_the_means_are_also_over_the_processes():
    def mean_with_a_process_of_zeros(values, reduce_op):
        assert reduce_op == "mean"
        return values / 2

    scalars = Meter(SimpleNamespace(device="cpu", all_reduce=mean_with_a_process_of_zeros), {}, 0)
    add(scalars, 1.0, 3.0)
    assert scalars.means() == {"loss": 1.0, "grad_norm": 2.0}


def test_the_rate_is_that_of_the_steps_since_the_last_entry_without_pauses(fabric, clock):
    scalars = Meter(fabric, {"loss": 1.0}, 1)  # the step of an earlier call is not timed
    add(scalars, *[1.0] * 20)
    scalars.pause(6.0)
    assert scalars.steps_per_second(clock.now + 10) == 5.0
    scalars.restart(clock.now + 10)
    add(scalars, 1.0)
    assert scalars.steps_per_second(clock.now + 12) == 0.5
