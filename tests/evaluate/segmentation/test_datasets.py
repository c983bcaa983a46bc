from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation import data_check
from fastmae.evaluate.segmentation.data_check import check_data, check_sizes
from fastmae.evaluate.segmentation.datasets import PairReader, WholePhotos
from fastmae.evaluate.segmentation.layout import find_data


def test_a_validation_photo_is_resized_and_its_mask_is_not(shapes):
    data = find_data(shapes)
    index, photo, mask = WholePhotos(data.val, PairReader(data, 4, 3), 34)[1]
    assert (index, mask.shape) == (1, (76, 94))
    assert (photo.shape, photo.dtype) == ((3, 34, 42), torch.uint8)
    np.testing.assert_array_equal(mask, np.array(Image.open(data.val[1].mask)))


def test_a_short_side_of_0_keeps_the_photo_as_it_is(shapes):
    data = find_data(shapes)
    _, photo, _ = WholePhotos(data.val, PairReader(data, 4, 1), 0)[1]
    assert photo.shape == (1, 76, 94)
    np.testing.assert_array_equal(photo[0], np.array(Image.open(data.val[1].image).convert("L")))


def test_an_id_that_the_check_did_not_read_is_named_when_its_mask_is_loaded(shapes, change_mask, monkeypatch):
    monkeypatch.setattr(data_check, "MAX_MASKS_READ", 2)
    change_mask(shapes / "masks" / "train" / "03.png", lambda ids: np.where(ids == 2, 9, ids).astype(np.uint8))
    data = find_data(shapes)
    read_pair = PairReader(data, len(check_data(data, 3).class_names), 3)
    read_pair(data.train[2])
    with pytest.raises(InputError, match=r"03\.png: holds the id 9, but classes\.json names 4 classes"):
        read_pair(data.train[3])


def test_a_mask_whose_size_has_changed_since_the_check_is_named(shapes, change_mask):
    data = find_data(shapes)
    change_mask(data.train[0].mask, lambda ids: ids[:, :-1])
    with pytest.raises(InputError, match=r"00\.png: 79 x 64 pixels, but its image 00\.jpg has 80 x 64"):
        PairReader(data, 4, 3)(data.train[0])


def test_a_photo_of_16_bits_is_mapped_as_in_pre_training(shapes):
    data = find_data(shapes)
    values = np.random.default_rng(0).integers(0, 256, (64, 80, 1), dtype=np.uint8)
    photo = data.train[0].image.with_suffix(".npy")
    np.save(photo, values.astype(np.int16) * 16 - 1000)
    pair = replace(data.train[0], image=photo)
    image, _ = PairReader(data, 4, 1, "-1000 3080")(pair)
    np.testing.assert_array_equal(image, values.transpose(2, 0, 1))
    assert check_sizes(pair, 1, "-1000 3080") == (80, 64)
