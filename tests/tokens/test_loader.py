"""Views written into given memory, in parts or by workers, are those of a whole batch."""

import itertools
import shutil
from dataclasses import fields

import pytest
import torch

from fastmae.errors import InputError
from fastmae.images.views import ViewDraws
from fastmae.runtime import ring
from fastmae.runtime.ring import FillsBatches, ring_batches
from fastmae.tokens import TokenStore
from fastmae.tokens.loader import ALIGNMENT, StoreViews

CPU = torch.device("cpu")
DRAWS = ViewDraws(4, True, "random", 4, seed=3)


@pytest.fixture(params=["vit_store", "small_store"])  # raw pixels and fp32; JPEG and pq
def views(request):
    return StoreViews([[TokenStore(request.getfixturevalue(request.param))]] * 2, DRAWS, with_middle=True)


def tensors(batch):
    found = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        found += value if isinstance(value, list) else [value]
    return found


def assert_equal(batch, other):
    for here, there in zip(tensors(batch), tensors(other), strict=True):
        assert here.dtype == there.dtype
        assert here.stride() == there.stride()
        assert torch.equal(here, there)


def test_a_batch_in_given_memory_takes_all_of_it_and_no_more(views):
    memory = torch.zeros(views.batch_bytes(5), dtype=torch.uint8)
    batch = views.batch_in(memory, 5)
    starts = [tensor.data_ptr() - memory.data_ptr() for tensor in tensors(batch)]
    assert all(start % ALIGNMENT == 0 for start in starts)
    ends = [start + tensor.nbytes for start, tensor in zip(starts, tensors(batch), strict=True)]
    spans = sorted(span for span in zip(starts, ends, strict=True) if span[0] < span[1])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert len(memory) - ALIGNMENT < spans[-1][1] <= len(memory)


def test_parts_written_one_by_one_are_the_whole_batch_bit_by_bit(views):
    assert isinstance(views, FillsBatches)
    visits = [(2, index) for index in range(9)]
    memory = torch.full((views.batch_bytes(9),), 7, dtype=torch.uint8)
    batch = views.batch_in(memory, 9)
    for first, end in ((4, 9), (0, 1), (1, 4)):
        views.fill(batch, first, visits[first:end])
    assert_equal(batch, views.__getitems__(visits))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_write_the_batches_that_this_process_would(views, workers, monkeypatch):
    monkeypatch.setattr(ring, "SMALLEST_PART", 3)
    visits = [[(epoch, index) for index in range(7)] for epoch in range(6)]
    for number, batch in enumerate(ring_batches(views, CPU, workers, visits, 7)):
        assert_equal(batch, views.__getitems__(visits[number]))
    assert number == 5


def test_damaged_images_in_several_parts_are_replaced_and_named_or_stop_the_loading(
    small_store, flip_in_record, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(ring, "SMALLEST_PART", 3)
    store = shutil.copytree(small_store, tmp_path / "copy.tokens")
    for row in (1, 2, 6):
        flip_in_record(store, 0, row)
    visits = [[(0, index) for index in range(8)]] * 2
    skipping = StoreViews([[TokenStore(store)]], DRAWS, on_damage="skip")
    loaded = [batch.pixels.clone() for batch in ring_batches(skipping, CPU, 2, visits, 8)]
    assert all(torch.equal(pixels, skipping.__getitems__(visits[0]).pixels) for pixels in loaded)
    assert skipping.damaged == {1, 2, 6}
    stopping = StoreViews([[TokenStore(store)]], DRAWS)
    with pytest.raises(
        InputError, match=r"image .*00000\.safetensors: the tokens of its image 1 are damaged"
    ) as caught:
        list(ring_batches(stopping, CPU, 2, visits, 8))
    assert "\n" not in str(caught.value)
