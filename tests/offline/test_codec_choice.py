"""`--codec auto` on tokens whose difficulty is known."""

import pytest
import torch

from fastmae.offline.codec_choice import HELD_OUT_EVERY, MIN_COSINE, choose_codec, product_codecs
from fastmae.offline.sample import TokenSample
from fastmae.teachers.precision import mean_cosine
from fastmae.tokens.learn import learn_from

C, GRID, IMAGES = 48, 6, 24


def sample_of(grids):
    """All tokens of float32 [n, GRID, GRID, C], with every `HELD_OUT_EVERY`-th image held out."""
    tokens = grids.flatten(1, 2)
    means = tokens.mean(1, keepdim=True).expand_as(tokens)
    numbers = torch.arange(len(grids)).repeat_interleave(GRID**2)
    return TokenSample(
        tokens.flatten(0, 1), means.flatten(0, 1), numbers, grids[::HELD_OUT_EVERY].clone(), HELD_OUT_EVERY
    )


def noise(count=IMAGES, dim=C):
    return torch.randn(count, GRID, GRID, dim, generator=torch.Generator().manual_seed(0))


def round_trip(codec, grids):
    codes, means = (torch.from_numpy(array) for array in codec.encode_grids(grids))
    return mean_cosine(codec.decode_grids(codes, means), grids)


def test_the_smallest_sufficient_codec_is_chosen():
    """Learnt on the images that are not held out, it keeps the cosine; the next smaller one does not."""
    sample = sample_of(noise())
    codec, cosine = choose_codec(sample, seed=0)
    names = product_codecs(C, 10**6)
    assert names == ["pq8", "pq12", "pq16", "pq20", "pq24"]
    assert codec.name in names[1:]
    learning = sample.images % HELD_OUT_EVERY != 0

    def held_out_cosine(name):
        return round_trip(learn_from(name, sample.tokens[learning], sample.means[learning], seed=0), sample.grids)

    assert cosine == pytest.approx(held_out_cosine(codec.name))
    assert cosine >= MIN_COSINE > held_out_cosine(names[names.index(codec.name) - 1])


def test_the_chosen_codec_has_learnt_from_the_whole_sample():
    sample = sample_of(noise() @ torch.diag(torch.arange(1, C + 1) ** -2.0))
    codec, _ = choose_codec(sample, seed=0)
    expected = learn_from(codec.name, sample.tokens, sample.means, seed=0)
    assert all((expected.tensors()[name] == array).all() for name, array in codec.tensors().items())


def test_tokens_of_few_channels_go_into_int8_and_those_beyond_fp16_into_fp32():
    assert choose_codec(sample_of(noise(dim=12)), seed=0)[0].name == "int8"
    assert choose_codec(sample_of(1e6 * noise(count=1)), seed=0)[0].name == "fp32"


def test_a_sample_that_is_too_small_for_256_centroids_is_not_tried_with_pq():
    assert product_codecs(C, 255) == []
    assert choose_codec(sample_of(noise(count=2)), seed=0)[0].name in ("int8", "fp16")
