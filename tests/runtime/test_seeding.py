import random

import numpy as np
import torch

from fastmae.runtime.seeding import drawn_from, seed_everything


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_seed_gives_the_same_draws_of_python_numpy_and_torch():
    seed_everything(2**40 + 3)
    first = draws()
    assert len(set(first)) == 3
    draws()
    seed_everything(2**40 + 3)
    assert draws() == first


def test_draws_from_a_seed_leave_the_generators_as_they_were():
    seed_everything(0)
    expected = draws(), draws()
    seed_everything(0)
    before = draws()
    with drawn_from(5, 1, 7):
        inside = draws()
    assert (before, draws()) == expected
    with drawn_from(5, 1, 7):
        assert draws() == inside
    with drawn_from(5, 1, 8):
        assert not set(draws()) & set(inside)
