import json

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.layout import Reading, find_data, read_mask


def as_ade(shapes, root):
    """The same photos and masks in ADE20K's own layout: 0 is ignored, class k is k + 1."""
    for split, own in (("train", "training"), ("val", "validation")):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / own).mkdir(parents=True)
        (root / "images" / own).symlink_to(shapes / "images" / split)
        for mask in (shapes / "masks" / split).iterdir():
            ids = np.array(Image.open(mask)).astype(int)
            Image.fromarray(np.where(ids == 255, 0, ids + 1).astype(np.uint8)).save(
                root / "annotations" / own / mask.name
            )
    return root


def test_photos_and_masks_are_paired_by_their_names(shapes):
    data = find_data(shapes)
    assert [pair.image.stem for pair in data.train] == [f"{number:02d}" for number in range(10)]
    assert all(pair.mask == shapes / "masks" / "train" / f"{pair.image.stem}.png" for pair in data.train)
    assert (len(data.val), data.names, data.unused) == (4, ("ground", "disc", "square", "never"), 0)


def test_ade20ks_zero_is_ignored_and_its_ids_count_from_one(shapes, tmp_path):
    data, own = find_data(shapes), find_data(as_ade(shapes, tmp_path / "ade"))
    assert own.reading == Reading(zero_ignored=True)
    assert (len(own.names), own.names[0], own.names[149]) == (150, "1", "150")
    for plain, shifted in zip(data.train + data.val, own.train + own.val, strict=True):
        np.testing.assert_array_equal(read_mask(plain.mask, data.reading), read_mask(shifted.mask, own.reading))


def test_ade20ks_table_gives_the_names_and_synonyms_only_where_the_first_word_is_not_enough(shapes, tmp_path):
    root = as_ade(shapes, tmp_path / "ade")
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.2\t9\t1\t1\twall\n2\t0.1\t9\t1\t1\tscreen;crt\n3\t0.1\t9\t1\t0\tscreen, silver screen\n"
    (root / "objectInfo150.txt").write_text(table)
    assert find_data(root).names == ("wall", "screen;crt", "screen, silver screen")


def test_grey_palette_one_bit_and_16_bit_masks_hold_the_same_ids(tmp_path):
    ids = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([200, 0, 0, 0, 200, 0] + [0] * 762)
    assert palette.mode == "P"
    masks = {
        "grey": Image.fromarray(ids),
        "palette": palette,
        "bit": Image.fromarray(ids.astype(bool)),
        "wide": Image.fromarray(ids.astype(np.uint16)),
    }
    for name, image in masks.items():
        image.save(tmp_path / f"{name}.png")
        read = read_mask(tmp_path / f"{name}.png", Reading())
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, ids, err_msg=name)


def test_another_ignored_id_is_read_as_255(shapes):
    (shapes / "classes.json").write_text(json.dumps({"classes": ["ground", "disc"], "ignore_index": 2}))
    data = find_data(shapes)
    mask = data.train[0].mask
    stored = np.array(Image.open(mask))
    assert (stored == 2).any()
    np.testing.assert_array_equal(read_mask(mask, data.reading), np.where(stored == 2, 255, stored))


@pytest.mark.parametrize(
    "held",
    [
        ["ground", "disc", "square"],
        {"0": "ground", "1": "disc", "2": "square"},
        {"classes": ["ground", "disc", "square"]},
    ],
)
def test_names_may_be_a_list_or_numbered(shapes, held):
    (shapes / "classes.json").write_text(json.dumps(held))
    assert find_data(shapes).names == ("ground", "disc", "square")


def test_two_classes_of_one_name_are_told_apart_by_their_ids(shapes):
    (shapes / "classes.json").write_text('["sky", "tree", "tree"]')
    assert find_data(shapes).names == ("sky", "tree (1)", "tree (2)")


BAD_NAMES = {
    "{": "can't be read as JSON",
    '{"1": "disc"}': "names of the ids 0, 1, 2 and so on without a gap",
    "7": "names of the ids 0, 1, 2 and so on without a gap",
    '{"classes": ["a", "b"], "ignore_index": 1}': "ignore_index 1; give a number up to 255 that no class has",
}


@pytest.mark.parametrize(("text", "line"), BAD_NAMES.items())
def test_bad_names_are_told(shapes, text, line):
    (shapes / "classes.json").write_text(text)
    with pytest.raises(InputError, match=r"classes\.json: ") as caught:
        find_data(shapes)
    assert line in str(caught.value)


def test_what_is_not_there_is_named(shapes, tmp_path):
    with pytest.raises(InputError, match="nowhere: does not exist"):
        find_data(tmp_path / "nowhere")
    (shapes / "masks" / "val").rename(shapes / "masks" / "test")
    with pytest.raises(
        InputError,
        match=r"shapes: no folder masks/val; give images/\{train,val\} with masks/\{train,val\}, or ADE20K's",
    ):
        find_data(shapes)


def test_an_empty_split_is_named(shapes):
    for photo in (shapes / "images" / "val").iterdir():
        photo.unlink()
    with pytest.raises(InputError, match="images/val: no image file in it"):
        find_data(shapes)


def test_a_missing_mask_is_named_and_counted(shapes):
    mask = shapes / "masks" / "train" / "03.png"
    Image.open(mask).save(mask.with_suffix(".jpg"))
    for name in ("03.png", "05.png"):
        (mask.parent / name).unlink()
    with pytest.raises(InputError) as caught:
        find_data(shapes)
    assert (
        f"images/train/03.jpg: has no mask {mask} (2 of 10 images lack theirs); there is 03.jpg, but only a PNG keeps ids"
        in str(caught.value)
    )


def test_two_photos_of_one_mask_are_refused(shapes):
    photo = shapes / "images" / "train" / "04.jpg"
    Image.open(photo).save(photo.with_suffix(".png"))
    with pytest.raises(InputError, match=r"images/train: has two images 04\.\* for the one mask"):
        find_data(shapes)


def test_masks_without_a_photo_are_counted(shapes):
    (shapes / "images" / "train" / "04.jpg").unlink()
    data = find_data(shapes)
    assert (len(data.train), data.unused) == (9, 1)


def test_a_mask_of_colours_is_refused(shapes):
    mask = shapes / "masks" / "train" / "02.png"
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(
        InputError, match=r"02\.png: has colours \(RGB\), not a class id a pixel; save the ids as a grey or palette PNG"
    ):
        read_mask(mask, Reading())


def test_ids_that_are_no_byte_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match=r"wide\.png: holds the id 1000; ids are 0 to 254"):
        read_mask(tmp_path / "wide.png", Reading())


def test_a_truncated_mask_is_named(shapes):
    mask = shapes / "masks" / "train" / "02.png"
    mask.write_bytes(mask.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"02\.png: damaged, or not an image"):
        read_mask(mask, Reading())
