"""Photos and their objects are resized and flipped together."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.detection import datasets
from fastmae.evaluate.detection.coco import find_splits, read_split
from fastmae.evaluate.detection.datasets import (
    SizeLimits,
    Targets,
    TrainingPhotos,
    ValidationPhotos,
    check_objects,
    collate_photos,
    load_objects,
    load_photo,
    mirror,
)
from fastmae.runtime.fabric import Fabric

COCO_LIMITS = SizeLimits(800, 1333)


@pytest.fixture
def split(rectangles):
    return read_split(find_splits(rectangles())[0])


def boxes_around(masks):
    """The boxes around masks, float [N, 4]."""
    boxes = []
    for mask in masks:
        rows, cols = np.nonzero(mask.numpy())
        boxes.append([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    return torch.tensor(boxes, dtype=torch.float32)


def test_a_flip_keeps_photo_boxes_and_masks_together(split):
    photo, objects = load_photo(split, 0, COCO_LIMITS, 3), load_objects(split, 0, COCO_LIMITS)
    flipped, flipped_objects = mirror(photo, objects)
    assert torch.equal(boxes_around(objects["masks"]), objects["boxes"])
    assert torch.equal(boxes_around(flipped_objects["masks"]), flipped_objects["boxes"])
    assert not torch.equal(flipped_objects["boxes"], objects["boxes"])
    red, blue = flipped_objects["masks"].bool()
    assert flipped[:, red].float().mean(1).tolist() == [230, 40, 40]
    assert flipped[:, blue].float().mean(1).tolist() == [40, 60, 240]


def test_a_large_photo_is_shrunk_with_its_boxes_and_masks(split):
    limits = SizeLimits(30, 50)
    width, height = split.size(1)
    photo, objects = load_photo(split, 1, limits, 3), load_objects(split, 1, limits)
    assert min(photo.shape[1:]) == 30
    assert photo.shape[1:] == objects["masks"].shape[1:]
    assert photo.shape[2] / photo.shape[1] == pytest.approx(width / height, rel=0.03)
    assert (boxes_around(objects["masks"]) - objects["boxes"]).abs().max() <= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (640, 480)),
        ((1600, 1200), (1067, 800)),
        ((4000, 1000), (1333, 333)),
        ((1000, 4000), (333, 1333)),
        ((30000, 2), (1333, 1)),
    ],
)
def test_limits_shrink_only_larger_photos(size, expected):
    assert COCO_LIMITS.shrink(size) == expected


def test_the_network_need_not_resize_a_shrunk_photo_again():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 5000, (500, 2)).tolist():
        shrunk = COCO_LIMITS.shrink((width, height))
        scale = min(COCO_LIMITS.short / min(shrunk), COCO_LIMITS.long / max(shrunk))  # torchvision's formula
        assert scale == 1 if shrunk != (width, height) else scale >= 1


def test_a_sample_follows_from_seed_epoch_and_index(split):
    photos = TrainingPhotos(split, COCO_LIMITS, 3, seed=1)
    drawn = [photos[epoch, index] for epoch in range(8) for index in range(4)]
    again = [TrainingPhotos(split, COCO_LIMITS, 3, seed=1)[epoch, index] for epoch in range(8) for index in range(4)]
    assert all(
        torch.equal(a, b) and torch.equal(x["masks"], y["masks"]) for (a, x), (b, y) in zip(drawn, again, strict=True)
    )
    straight = [load_photo(split, index, COCO_LIMITS, 3) for index in range(4)] * 8
    assert 4 < sum(torch.equal(a, b) for (a, _), b in zip(drawn, straight, strict=True)) < 28


def test_crowds_are_not_among_the_objects_to_train_on(rectangles):
    split = read_split(find_splits(rectangles(lambda content: content["annotations"][0].update(iscrowd=1)))[0])
    assert load_objects(split, 0, COCO_LIMITS)["labels"].tolist() == [2]


@pytest.mark.promise("labels")
def test_objects_that_are_too_thin_once_the_photo_is_shrunk_are_left_out_and_counted(rectangles):
    thin = SizeLimits(3, 5)  # of photos of 60 pixels and more
    split = read_split(
        find_splits(rectangles(lambda content: content["annotations"][0]["bbox"].__setitem__(2, 0.1)))[0]
    )
    assert (check_objects(split, COCO_LIMITS), check_objects(split, thin)) == (0, 1)
    assert load_objects(split, 0, COCO_LIMITS)["labels"].tolist() == [1, 2]
    objects = load_objects(split, 0, thin)
    assert objects["labels"].tolist() == [2]
    assert len(objects["boxes"]) == len(objects["masks"]) == 1


@pytest.mark.promise("labels")
def test_a_photo_whose_masks_would_fill_the_memory_is_named_before_the_training(rectangles, monkeypatch):
    split = read_split(find_splits(rectangles())[0])
    monkeypatch.setattr(datasets, "MOST_MASK_BYTES", 2 * 90 * 90)
    check_objects(split, COCO_LIMITS)
    monkeypatch.setattr(datasets, "MOST_MASK_BYTES", 2 * 60 * 60)
    with pytest.raises(InputError, match=r"annotations\.json: '00\.png' has 2 objects, .*smaller --image-size$"):
        check_objects(split, COCO_LIMITS)


def test_an_image_without_objects_has_empty_tensors(rectangles):
    data = rectangles(lambda content: content.update(annotations=content["annotations"][2:]))
    split = read_split(find_splits(data)[0])
    objects = load_objects(split, 0, COCO_LIMITS)
    assert objects["boxes"].shape == (0, 4)
    assert objects["masks"].shape == (0, split.size(0)[1], split.size(0)[0])


def test_photos_are_decoded_to_grey_for_a_grey_encoder(split):
    photo = ValidationPhotos(split, COCO_LIMITS, 1)[0][1]
    assert photo.shape == (1, split.size(0)[1], split.size(0)[0])
    assert photo.dtype == torch.uint8


def test_a_damaged_photo_is_named(split):
    Image.new("RGB", (500, 500)).save(split.path(0))
    split.path(0).write_bytes(split.path(0).read_bytes()[:300])
    with pytest.raises(InputError, match=r"00\.png: "):
        load_photo(split, 0, COCO_LIMITS, 3)


def test_fabric_does_not_round_boxes_to_bf16(split):
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    photos, targets = fabric.to_device(collate_photos([TrainingPhotos(split, COCO_LIMITS, 3, 0)[0, 0]]))
    assert isinstance(targets, Targets)
    targets.objects[0]["boxes"] += 300.125  # bf16 can't hold these
    _, converted = fabric._precision.convert_input((photos, targets))
    assert converted.objects[0]["boxes"].dtype == torch.float32
    assert torch.equal(converted.objects[0]["boxes"], targets.objects[0]["boxes"])


@pytest.mark.promise("values")
def test_photos_of_16_bits_are_mapped_as_in_pre_training(split):
    width, height = split.size(0)
    values = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(values.astype(np.uint16) * 16).save(split.path(0))
    for photo in (
        load_photo(split, 0, COCO_LIMITS, 1, "0 4080"),
        ValidationPhotos(split, COCO_LIMITS, 1, "0 4080")[0][1],
    ):
        np.testing.assert_array_equal(photo[0], values)
    photo, _ = TrainingPhotos(split, COCO_LIMITS, 1, 0, "0 4080")[0, 0]
    assert np.array_equal(photo[0], values) or np.array_equal(photo[0], values[:, ::-1])
