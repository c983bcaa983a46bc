from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fastmae.errors import InputError
from fastmae.evaluate.transforms import LabelledImages, centre_crop, crop_augmentation, full_augmentation
from fastmae.images.middle import to_tensor
from fastmae.images.views import normalise
from fastmae.probes.labelled import open_labelled
from fastmae.runs.encoder import open_encoder


@pytest.fixture(scope="module")
def opened(tiny_run):
    return open_encoder(str(tiny_run))


def test_the_strongest_augmentation_draws_the_same_for_a_visit_and_never_fails(photos, opened):
    data = open_labelled(photos)
    augmentation = full_augmentation(opened, "rand-m10-mstd2-inc1", 0.5)
    pictures = LabelledImages(data.train, data.train_labels, 3, augmentation)
    for epoch in range(20):
        image, label = pictures[epoch, epoch]
        assert image.shape == (3, 64, 64)
        assert label == data.train_labels[epoch]
        assert torch.equal(image, pictures[epoch, epoch][0])
    assert not torch.equal(pictures[0, 0][0], pictures[1, 0][0])


def test_an_image_of_val_is_the_same_at_every_reading(photos, opened):
    data = open_labelled(photos)
    pictures = LabelledImages(data.val, data.val_labels, 3, centre_crop(opened))
    image, label = pictures[3]
    assert image.shape == (3, 64, 64)
    assert label == data.val_labels[3]
    assert torch.equal(image, pictures[3][0])


@pytest.mark.parametrize(("width", "height"), [(640, 427), (300, 301), (50, 90)])
def test_the_centre_is_that_of_the_resized_picture(width, height, opened):
    photo = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, width, height))
    resized = photo.resize([73 * side // min(width, height) for side in photo.size], Image.Resampling.BICUBIC)
    left, top = (round((side - 64) / 2) for side in resized.size)
    expected = normalise(to_tensor(resized.crop((left, top, left + 64, top + 64))))
    difference = (centre_crop(opened)(photo) - expected).abs() * 255 * torch.tensor(opened.std).view(3, 1, 1)
    assert (difference > 0.5).float().mean() < 0.02  # by one level, where the sum lies between two
    assert difference.max() < 2.5
    bands = centre_crop(replace(opened, mean=(0.0,) * 2, std=(1.0,) * 2))([photo.getchannel(1), photo.getchannel(1)])
    assert torch.equal(bands[0], bands[1])


@pytest.mark.promise("images")
@pytest.mark.parametrize("size", [(400_000, 1), (1, 400_000), (1, 1)])
def test_a_picture_of_any_aspect_ratio_costs_no_more_than_another(size, opened):
    colour = (10, 20, 30)
    expected = normalise(torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).expand(3, 64, 64)
    for transform in (centre_crop(opened), crop_augmentation(opened)):
        torch.testing.assert_close(transform(Image.new("RGB", size, colour)), expected)


def test_a_damaged_image_is_named(photos, opened, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    pictures = LabelledImages([tmp_path / "broken.jpg"], torch.zeros(1), 3, centre_crop(opened))
    with pytest.raises(InputError, match=r"broken\.jpg"):
        pictures[0]


@pytest.mark.promise("values")
def test_values_of_16_bits_are_mapped_as_in_pre_training(opened, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (80, 90), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "8.png")
    Image.fromarray(values.astype(np.uint16) * 16).save(tmp_path / "12.png")
    paths = [tmp_path / "8.png", tmp_path / "12.png"]
    pictures = LabelledImages(paths, torch.zeros(2), 3, centre_crop(opened), value_range="0 4080")
    assert torch.equal(pictures[0][0], pictures[1][0])
