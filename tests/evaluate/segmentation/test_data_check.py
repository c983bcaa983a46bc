import json
import os

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation import data_check
from fastmae.evaluate.segmentation.data_check import check_data
from fastmae.evaluate.segmentation.layout import find_data


def test_the_summary_has_the_sizes_and_ids_of_the_files(shapes):
    data = find_data(shapes)
    summary = check_data(data, channels=3)
    masks = [np.array(Image.open(pair.mask)) for pair in data.train]
    assert summary.short_side == sorted(min(mask.shape) for mask in masks)[4] == 68
    counts = sum(np.bincount(mask.ravel(), minlength=256) for mask in masks)
    np.testing.assert_array_equal(summary.pixel_counts, counts)
    assert summary.masks_read == 14
    assert summary.class_names == ("ground", "disc", "square", "never")
    assert summary.untrained_classes == ["never"]


def test_without_names_there_are_as_many_classes_as_ids_in_the_masks(shapes):
    (shapes / "classes.json").unlink()
    assert check_data(find_data(shapes), channels=3).class_names == ("0", "1", "2")


def test_of_many_masks_some_are_read_unless_only_the_masks_tell_the_classes(shapes, monkeypatch):
    monkeypatch.setattr(data_check, "MAX_MASKS_READ", 3)
    assert check_data(find_data(shapes), channels=3).masks_read == 3 + 2
    (shapes / "classes.json").unlink()
    assert check_data(find_data(shapes), channels=3).masks_read == 14


def test_an_id_without_a_class_is_named_with_its_file(shapes, change_mask):
    change_mask(shapes / "masks" / "val" / "11.png", lambda ids: np.where(ids == 2, 7, ids).astype(np.uint8))
    with pytest.raises(InputError, match=r"masks/val/11\.png: holds the id 7, .* 4 classes \(0 to 3, 255 is ignored\)"):
        check_data(find_data(shapes), channels=3)


def test_a_mask_of_another_size_than_its_photo_is_named(shapes, change_mask):
    change_mask(shapes / "masks" / "train" / "05.png", lambda ids: ids[:-2])
    with pytest.raises(InputError, match=r"masks/train/05\.png: 94 x 66 pixels, but its image 05\.jpg has 94 x 68"):
        check_data(find_data(shapes), channels=3)


def test_a_photo_that_exif_turns_is_measured_upright(shapes, change_mask):
    photo = shapes / "images" / "train" / "01.jpg"
    image = Image.open(photo)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(photo, exif=exif)
    with pytest.raises(InputError, match=r"01\.png: .*EXIF orientation"):
        check_data(find_data(shapes), channels=3)
    change_mask(shapes / "masks" / "train" / "01.png", lambda ids: np.rot90(ids, -1))
    check_data(find_data(shapes), channels=3)


def test_a_photo_that_is_not_an_image_is_named(shapes):
    (shapes / "images" / "train" / "01.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"images/train/01\.jpg: not an image"):
        check_data(find_data(shapes), channels=3)


def test_a_mask_with_colours_is_named(shapes):
    mask = shapes / "masks" / "val" / "12.png"
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(InputError, match=r"12\.png: has colours"):
        check_data(find_data(shapes), channels=3)


def test_masks_of_one_class_are_refused_with_a_hint_for_black_and_white_ones(shapes, change_mask):
    for mask in (shapes / "masks").rglob("*.png"):
        change_mask(mask, lambda ids: np.where(ids == 1, 255, 0).astype(np.uint8))
    with pytest.raises(InputError, match=r"the class 0 alone; .*write the object as 1"):
        check_data(find_data(shapes), channels=3)
    for mask in (shapes / "masks").rglob("*.png"):
        change_mask(mask, lambda ids: np.full_like(ids, 2))
    with pytest.raises(InputError, match=r"the class 2 alone; there is nothing to tell apart$"):
        check_data(find_data(shapes), channels=3)


def smooth(mask):
    """A mask of 0, 1 and 2, drawn in white and resized as photos are."""
    white = Image.fromarray((mask == 1).astype(np.uint8) * 254)
    return np.array(white.resize((mask.shape[1] // 3, mask.shape[0] // 3), Image.Resampling.LANCZOS).resize(white.size))


@pytest.mark.promise("labels")
def test_masks_with_smoothed_edges_are_refused_and_counted(shapes, change_mask):
    for name in ("03", "05"):
        change_mask(shapes / "masks" / "train" / f"{name}.png", smooth)
    message = r"masks/train/03\.png: holds \d+ values, \d+ of them in less than 0\.2 % .*\(2 of the 14 masks read"
    with pytest.raises(InputError, match=message):
        check_data(find_data(shapes), channels=3)
    (shapes / "classes.json").unlink()
    with pytest.raises(InputError, match=message):
        check_data(find_data(shapes), channels=3)


def test_many_values_are_ids_where_all_of_them_have_names(shapes, change_mask):
    change_mask(shapes / "masks" / "train" / "03.png", smooth)
    (shapes / "classes.json").write_text(json.dumps([str(number) for number in range(255)]))
    assert len(check_data(find_data(shapes), channels=3).class_names) == 255


@pytest.mark.promise("labels")
def test_a_mask_that_is_a_pipe_is_refused_instead_of_waited_for(shapes):
    mask = shapes / "masks" / "val" / "11.png"
    data = find_data(shapes)
    mask.unlink()
    os.mkfifo(mask)
    with pytest.raises(InputError, match=r"11\.png: is a named pipe"):
        check_data(data, channels=3)


@pytest.mark.parametrize(("split", "split_name"), [("train", "training"), ("val", "validation")])
def test_masks_in_which_every_pixel_is_ignored_are_refused(shapes, change_mask, split, split_name):
    for mask in (shapes / "masks" / split).iterdir():
        change_mask(mask, lambda ids: np.full_like(ids, 255))
    with pytest.raises(InputError, match=f"every pixel of the {split_name} masks is 255"):
        check_data(find_data(shapes), channels=3)
