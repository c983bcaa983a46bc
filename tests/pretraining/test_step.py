from types import SimpleNamespace

import pytest
import torch

from fastmae.images.views import normalise
from fastmae.pretraining.step import PREFETCH_EVERY, PretrainStep, prefetching
from fastmae.tokens.format import shard_name


class PixelsPlusOne:
    """The target of a view: its normalised pixels plus one."""

    reads_middle = False

    def __call__(self, batch, images):
        return images + 1


def test_a_step_compares_the_prediction_from_normalised_views_with_their_target():
    pixels, ids_shuffle = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), torch.arange(8).view(2, 4)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    step = PretrainStep(PixelsPlusOne(), lambda *compared: {"loss": compared}, mean, std)
    batch = SimpleNamespace(pixels=pixels, ids_shuffle=ids_shuffle)
    prediction, features, ids = step(lambda *inputs: inputs, batch)["loss"]
    assert torch.equal(prediction[0], normalise(pixels, mean, std))
    assert prediction[1] is ids is ids_shuffle
    assert torch.equal(features, prediction[0] + 1)


class Store:
    """A remote store that notes which shards are prefetched."""

    def __init__(self, shard_size):
        self.info, self.files, self.prefetched = SimpleNamespace(shard_size=shard_size), self, []

    def prefetch(self, names):
        self.prefetched.append(names)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_the_shards_of_the_next_steps_are_prefetched_regularly(grad_accum_steps):
    first, alike, other_shards = Store(8), Store(8), Store(16)
    plan = SimpleNamespace(stores=[[first], [alike, other_shards]], shuffle_window=2)
    sampler = SimpleNamespace(
        grad_accum_steps=grad_accum_steps, start_step=5, shards_ahead=lambda step, count: range(step, step + count)
    )
    batches = range((2 * PREFETCH_EVERY + 1) * grad_accum_steps)
    assert list(prefetching(plan)(batches, sampler)) == list(batches)
    expected = [
        [shard_name(shard) for shard in range(step, step + 4)]
        for step in (5, 5 + PREFETCH_EVERY, 5 + 2 * PREFETCH_EVERY)
    ]
    assert first.prefetched == alike.prefetched == expected
    assert other_shards.prefetched == []  # its shards of these numbers hold other images
