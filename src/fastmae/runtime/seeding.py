"""Random draws that follow from a seed alone."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def drawn_from(*seed: int) -> Iterator[None]:
    """Within it, Python's, NumPy's and torch's generators give what follows from the seed alone: augmentation draws from all three."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    torch.default_generator.manual_seed(
        word
    )  # the CPU's alone: torch.manual_seed would seed GPUs too, a fifth of a millisecond
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
