"""Photos and their objects: they shrink and turn together."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.detection.coco import find_splits, read_split
from fastmae.evaluate.detection.datasets import (
    Limits,
    Targets,
    TrainingPhotos,
    ValidationPhotos,
    as_batch,
    load_objects,
    load_photo,
    mirrored,
)
from fastmae.runtime.fabric import Fabric

WHOLE = Limits(800, 1333)


@pytest.fixture
def split(rectangles):
    return read_split(find_splits(rectangles())[0])


def bounds_of_masks(masks):
    """Boxes around masks, float [N, 4], by looking."""
    found = []
    for mask in masks:
        rows, cols = np.nonzero(mask.numpy())
        found.append([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    return torch.tensor(found, dtype=torch.float32)


def test_a_flip_keeps_photo_boxes_and_masks_together(split):
    photo, objects = load_photo(split, 0, WHOLE, 3), load_objects(split, 0, WHOLE)
    turned, turned_objects = mirrored(photo, objects)
    assert torch.equal(bounds_of_masks(objects["masks"]), objects["boxes"])
    assert torch.equal(bounds_of_masks(turned_objects["masks"]), turned_objects["boxes"])
    assert not torch.equal(turned_objects["boxes"], objects["boxes"])
    red, blue = turned_objects["masks"].bool()
    assert turned[:, red].float().mean(1).tolist() == [230, 40, 40]
    assert turned[:, blue].float().mean(1).tolist() == [40, 60, 240]


def test_a_large_photo_shrinks_with_its_boxes_and_masks(split):
    limits = Limits(30, 50)
    width, height = split.size(1)
    photo, objects = load_photo(split, 1, limits, 3), load_objects(split, 1, limits)
    assert min(photo.shape[1:]) == 30
    assert photo.shape[1:] == objects["masks"].shape[1:]
    assert photo.shape[2] / photo.shape[1] == pytest.approx(width / height, rel=0.03)
    assert (bounds_of_masks(objects["masks"]) - objects["boxes"]).abs().max() <= 1


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
def test_limits_cut_only_what_is_larger(size, expected):
    assert WHOLE.cut(size) == expected


def test_what_is_cut_needs_no_resizing_in_the_network():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 5000, (500, 2)).tolist():
        cut = WHOLE.cut((width, height))
        scale = min(WHOLE.short / min(cut), WHOLE.long / max(cut))  # torchvision's
        assert scale == 1 if cut != (width, height) else scale >= 1


def test_a_sample_follows_from_seed_epoch_and_index(split):
    photos = TrainingPhotos(split, WHOLE, 3, seed=1)
    drawn = [photos[epoch, index] for epoch in range(8) for index in range(4)]
    again = [TrainingPhotos(split, WHOLE, 3, seed=1)[epoch, index] for epoch in range(8) for index in range(4)]
    assert all(
        torch.equal(a, b) and torch.equal(x["masks"], y["masks"]) for (a, x), (b, y) in zip(drawn, again, strict=True)
    )
    straight = [load_photo(split, index, WHOLE, 3) for index in range(4)] * 8
    assert 4 < sum(torch.equal(a, b) for (a, _), b in zip(drawn, straight, strict=True)) < 28


def test_crowds_are_not_among_the_objects_to_learn(rectangles):
    split = read_split(find_splits(rectangles(lambda content: content["annotations"][0].update(iscrowd=1)))[0])
    assert load_objects(split, 0, WHOLE)["labels"].tolist() == [2]


def test_an_image_without_objects_has_empty_ones(rectangles):
    split = read_split(
        find_splits(rectangles(lambda content: content.update(annotations=content["annotations"][2:])))[0]
    )
    objects = load_objects(split, 0, WHOLE)
    assert objects["boxes"].shape == (0, 4)
    assert objects["masks"].shape == (0, split.size(0)[1], split.size(0)[0])


def test_grey_encoders_get_grey_photos(split):
    photo = ValidationPhotos(split, WHOLE, 1)[0][1]
    assert photo.shape == (1, split.size(0)[1], split.size(0)[0])
    assert photo.dtype == torch.uint8


def test_a_damaged_photo_is_named(split):
    Image.new("RGB", (500, 500)).save(split.path(0))
    split.path(0).write_bytes(split.path(0).read_bytes()[:300])
    with pytest.raises(InputError, match=r"00\.png: .*replace it"):
        load_photo(split, 0, WHOLE, 3)


def test_fabric_leaves_the_boxes_of_a_batch_as_they_are(split):
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    photos, targets = fabric.to_device(as_batch([TrainingPhotos(split, WHOLE, 3, 0)[0, 0]]))
    assert isinstance(targets, Targets)
    targets.objects[0]["boxes"] += 300.125  # no number of bf16
    _, seen = fabric._precision.convert_input((photos, targets))
    assert seen.objects[0]["boxes"].dtype == torch.float32
    assert torch.equal(seen.objects[0]["boxes"], targets.objects[0]["boxes"])
