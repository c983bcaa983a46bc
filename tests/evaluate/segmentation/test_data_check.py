import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation import data_check as module
from fastmae.evaluate.segmentation.layout import find_data
from fastmae.evaluate.segmentation.data_check import survey


def test_sizes_and_ids_are_what_the_files_hold(shapes):
    data = find_data(shapes)
    found = survey(data, channels=3)
    masks = [np.array(Image.open(pair.mask)) for pair in data.train]
    assert found.short_side == sorted(min(mask.shape) for mask in masks)[4] == 68
    np.testing.assert_array_equal(found.pixels, sum(np.bincount(mask.ravel(), minlength=256) for mask in masks))
    assert (found.decoded, found.names, found.untrained) == (14, ("ground", "disc", "square", "never"), ["never"])


def test_without_names_the_masks_tell_how_many_classes_there_are(shapes):
    (shapes / "classes.json").unlink()
    assert survey(find_data(shapes), channels=3).names == ("0", "1", "2")


def test_of_many_masks_a_part_is_decoded_unless_nothing_else_tells_the_classes(shapes, monkeypatch):
    monkeypatch.setattr(module, "MANY", 3)
    assert survey(find_data(shapes), channels=3).decoded == 3 + 2
    (shapes / "classes.json").unlink()
    assert survey(find_data(shapes), channels=3).decoded == 14


def test_an_id_that_no_class_has_is_named_with_its_file(shapes, change_mask):
    change_mask(shapes / "masks" / "val" / "11.png", lambda ids: np.where(ids == 2, 7, ids).astype(np.uint8))
    with pytest.raises(InputError) as caught:
        survey(find_data(shapes), channels=3)
    line = "masks/val/11.png: holds the id 7, but classes.json names 4 classes (0 to 3, 255 is ignored)"
    assert str(caught.value).endswith(line)


def test_a_size_that_is_not_the_photos_is_named(shapes, change_mask):
    change_mask(shapes / "masks" / "train" / "05.png", lambda ids: ids[:-2])
    with pytest.raises(
        InputError, match=r"masks/train/05\.png: 94 x 66 pixels, but its image 05\.jpg has 94 x 68; a mask holds one id"
    ):
        survey(find_data(shapes), channels=3)


def test_a_photo_that_exif_turns_is_measured_upright(shapes, change_mask):
    photo = shapes / "images" / "train" / "01.jpg"
    image = Image.open(photo)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(photo, exif=exif)
    with pytest.raises(InputError, match="its EXIF orientation turns the photo, but not its mask"):
        survey(find_data(shapes), channels=3)
    change_mask(shapes / "masks" / "train" / "01.png", lambda ids: np.rot90(ids, -1))
    survey(find_data(shapes), channels=3)


def test_a_photo_that_is_none_is_named(shapes):
    (shapes / "images" / "train" / "01.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"images/train/01\.jpg: not an image, or damaged"):
        survey(find_data(shapes), channels=3)


def test_a_mask_of_colours_is_named(shapes):
    mask = shapes / "masks" / "val" / "12.png"
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(InputError, match=r"12\.png: has colours \(RGB\)"):
        survey(find_data(shapes), channels=3)


def test_masks_of_one_class_alone_are_refused_and_black_and_white_ones_explained(shapes, change_mask):
    for mask in (shapes / "masks").rglob("*.png"):
        change_mask(mask, lambda ids: np.where(ids == 1, 255, 0).astype(np.uint8))
    with pytest.raises(
        InputError,
        match=r"hold the class 0 alone; there is nothing to tell apart; 255 is ignored: write the object as 1",
    ):
        survey(find_data(shapes), channels=3)
    for mask in (shapes / "masks").rglob("*.png"):
        change_mask(mask, lambda ids: np.full_like(ids, 2))
    with pytest.raises(InputError, match=r"hold the class 2 alone; there is nothing to tell apart$"):
        survey(find_data(shapes), channels=3)


@pytest.mark.parametrize(("split", "word"), [("train", "training"), ("val", "validation")])
def test_masks_in_which_nothing_counts_are_refused(shapes, change_mask, split, word):
    for mask in (shapes / "masks" / split).iterdir():
        change_mask(mask, lambda ids: np.full_like(ids, 255))
    with pytest.raises(InputError, match=f"every pixel of the {word} masks is 255, which is ignored"):
        survey(find_data(shapes), channels=3)
