import json
import os

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.layout import find_data
from fastmae.evaluate.segmentation.masks import MaskEncoding, read_mask


def test_photos_and_masks_are_paired_by_their_names(shapes):
    data = find_data(shapes)
    assert [pair.image.stem for pair in data.train] == [f"{number:02d}" for number in range(10)]
    assert all(pair.mask == shapes / "masks" / "train" / f"{pair.image.stem}.png" for pair in data.train)
    assert (len(data.val), data.class_names, data.unused_masks) == (4, ("ground", "disc", "square", "never"), 0)


def test_in_ade20k_zero_is_ignored_and_ids_count_from_one(shapes, shapes_as_ade):
    data, ade = find_data(shapes), find_data(shapes_as_ade)
    assert ade.encoding == MaskEncoding(zero_ignored=True)
    assert (len(ade.class_names), ade.class_names[0], ade.class_names[149]) == (150, "1", "150")
    for pair, ade_pair in zip(data.train + data.val, ade.train + ade.val, strict=True):
        np.testing.assert_array_equal(read_mask(pair.mask, data.encoding), read_mask(ade_pair.mask, ade.encoding))


def test_ade20k_names_have_synonyms_only_where_the_first_word_is_ambiguous(shapes_as_ade):
    table = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.2\t9\t1\t1\twall",
        "2\t0.1\t9\t1\t1\tscreen;crt",
        "3\t0.1\t9\t1\t0\tscreen, silver screen",
    ]
    (shapes_as_ade / "objectInfo150.txt").write_text("\n".join(table))
    assert find_data(shapes_as_ade).class_names == ("wall", "screen;crt", "screen, silver screen")


def test_another_table_than_ade20ks_is_refused(shapes_as_ade):
    (shapes_as_ade / "objectInfo150.txt").write_text("Idx\tName\n2\twall\n1\tsky\n")
    with pytest.raises(InputError, match=r"objectInfo150\.txt: "):
        find_data(shapes_as_ade)


def test_the_ignore_index_of_the_names_file_is_read_as_255(shapes):
    (shapes / "classes.json").write_text(json.dumps({"classes": ["ground", "disc"], "ignore_index": 2}))
    data = find_data(shapes)
    mask = data.train[0].mask
    stored = np.array(Image.open(mask))
    assert (stored == 2).any()
    np.testing.assert_array_equal(read_mask(mask, data.encoding), np.where(stored == 2, 255, stored))


@pytest.mark.parametrize(
    "content",
    [
        ["ground", "disc", "square"],
        {"0": "ground", "1": "disc", "2": "square"},
        {"classes": ["ground", "disc", "square"]},
    ],
)
def test_names_may_be_a_list_or_an_object_by_ids(shapes, content):
    (shapes / "classes.json").write_text(json.dumps(content))
    assert find_data(shapes).class_names == ("ground", "disc", "square")


def test_classes_of_the_same_name_are_told_apart_by_their_ids(shapes):
    (shapes / "classes.json").write_text('["sky", "tree", "tree"]')
    assert find_data(shapes).class_names == ("sky", "tree (1)", "tree (2)")


BAD_NAMES = {
    "{": "JSON",
    '{"1": "disc"}': "without a gap",
    "7": "without a gap",
    '{"0": ["a"], "1": {"b": 7.5}}': "without a gap",
    "[" * 100_000: "without a gap",
    '["a", NaN]': "not JSON",
    " " * (1 << 20) + "[]": "1.049 MB that such a file may have",
    "[]": "without a gap",
    '{"classes": ["a", "b"], "ignore_index": 1}': "ignore_index 1",
}


@pytest.mark.parametrize(("text", "problem"), BAD_NAMES.items())
def test_an_unusable_names_file_is_refused_with_the_problem(shapes, text, problem):
    (shapes / "classes.json").write_text(text)
    with pytest.raises(InputError, match=r"classes\.json: ") as caught:
        find_data(shapes)
    assert problem in str(caught.value)


@pytest.mark.promise("labels")
@pytest.mark.parametrize("place", ["classes.json", "objectInfo150.txt"])
def test_a_pipe_with_the_names_is_refused_instead_of_waited_for(place, shapes, shapes_as_ade):
    root = shapes if place == "classes.json" else shapes_as_ade
    (root / place).unlink(missing_ok=True)
    os.mkfifo(root / place)
    with pytest.raises(InputError, match=f"{place}: is a named pipe"):
        find_data(root)


def test_a_missing_folder_is_named(shapes, tmp_path):
    with pytest.raises(InputError, match="nowhere: does not exist"):
        find_data(tmp_path / "nowhere")
    (shapes / "masks" / "val").rename(shapes / "masks" / "test")
    with pytest.raises(InputError, match=r"shapes: no folder masks/val; .*ADE20K"):
        find_data(shapes)


def test_an_empty_split_is_named(shapes):
    for photo in (shapes / "images" / "val").iterdir():
        photo.unlink()
    with pytest.raises(InputError, match="images/val: no image file"):
        find_data(shapes)


def test_the_first_missing_mask_is_named_and_all_are_counted(shapes):
    mask = shapes / "masks" / "train" / "03.png"
    Image.open(mask).save(mask.with_suffix(".jpg"))
    for name in ("03.png", "05.png"):
        (mask.parent / name).unlink()
    with pytest.raises(InputError) as caught:
        find_data(shapes)
    message = str(caught.value)
    assert f"images/train/03.jpg: has no mask {mask} (2 of 10 images" in message
    assert "there is 03.jpg, but only a PNG" in message


def test_two_photos_for_one_mask_are_refused(shapes):
    photo = shapes / "images" / "train" / "04.jpg"
    Image.open(photo).save(photo.with_suffix(".png"))
    with pytest.raises(InputError, match=r"images/train: has two images 04\.\*"):
        find_data(shapes)


def test_masks_without_a_photo_are_counted(shapes):
    (shapes / "images" / "train" / "04.jpg").unlink()
    data = find_data(shapes)
    assert (len(data.train), data.unused_masks) == (9, 1)
