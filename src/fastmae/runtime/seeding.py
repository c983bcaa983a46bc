"""Random draws that follow from a seed alone.

Augmentation and mixing draw from Python's, NumPy's and torch's generators, so all three are seeded together.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (on every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def drawn_from(*seed: int) -> Iterator[None]:
    """Seed the CPU's generators within the context, and restore their states at its end.

    Args:
        seed: any number of integers, such as a run's seed, the epoch and the image's index.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(seed_word)
    np.random.seed(seed_word)
    # torch.manual_seed would seed the GPUs too, which takes 0.2 ms per image.
    torch.default_generator.manual_seed(seed_word)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
