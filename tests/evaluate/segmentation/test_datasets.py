import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation import data_check as survey_module
from fastmae.evaluate.segmentation.layout import find_data
from fastmae.evaluate.segmentation.datasets import PairReader, WholePhotos, stack
from fastmae.evaluate.segmentation.data_check import survey


def test_a_photo_is_evaluated_at_the_asked_size_against_its_mask_as_it_is(shapes):
    data = find_data(shapes)
    index, photo, mask = WholePhotos(data.val, PairReader(data, 4, 3), 34)[1]
    assert (index, mask.shape) == (1, (76, 94))
    assert (photo.shape, photo.dtype) == ((3, 34, 42), torch.uint8)
    np.testing.assert_array_equal(mask, np.array(Image.open(data.val[1].mask)))
    whole = WholePhotos(data.val, PairReader(data, 4, 1), 0)[1][1]
    assert whole.shape == (1, 76, 94)
    np.testing.assert_array_equal(whole[0], np.array(Image.open(data.val[1].image).convert("L")))


def test_an_id_that_the_survey_did_not_see_is_named_when_it_is_read(shapes, change_mask, monkeypatch):
    monkeypatch.setattr(survey_module, "MANY", 2)
    change_mask(shapes / "masks" / "train" / "03.png", lambda ids: np.where(ids == 2, 9, ids).astype(np.uint8))
    data = find_data(shapes)
    read = PairReader(data, len(survey(data, 3).names), 3)
    read(data.train[2])
    with pytest.raises(InputError, match=r"03\.png: holds the id 9, but classes\.json names 4 classes"):
        read(data.train[3])


def test_a_mask_that_has_changed_its_size_since_the_survey_is_named(shapes, change_mask):
    data = find_data(shapes)
    change_mask(data.train[0].mask, lambda ids: ids[:, :-1])
    with pytest.raises(InputError, match=r"00\.png: 79 x 64 pixels, but its image 00\.jpg has 80 x 64"):
        PairReader(data, 4, 3)(data.train[0])


def test_crops_are_stacked_to_a_batch():
    crops = [(torch.full((3, 4, 4), n, dtype=torch.uint8), torch.full((4, 4), n, dtype=torch.uint8)) for n in range(2)]
    images, masks = stack(crops)
    assert (images.shape, masks.shape) == ((2, 3, 4, 4), (2, 4, 4))
    assert images[1].unique() == masks[1].unique() == 1
