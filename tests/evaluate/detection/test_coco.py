"""A split read from its annotations, and every way in which they can be wrong."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.detection.coco import find_splits, read_split


def read(data):
    """Both splits, as `fastmae detect` reads them."""
    train_files, val_files = find_splits(data)
    train = read_split(train_files)
    return train, read_split(val_files, train.classes)


def test_category_ids_with_gaps_become_labels_from_1_in_their_order(rectangles):
    train, val = read(rectangles())
    assert train.classes == val.classes == {3: "red", 8: "blue"}
    assert train.labels.tolist() == [1, 2] * 4


def test_objects_are_sorted_by_image_whatever_their_order_in_the_file(rectangles):
    train, _ = read(rectangles(lambda content: content["annotations"].reverse()))
    assert train.labels.tolist() == [2, 1] * 4
    assert [list(train.objects(image)) for image in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert train.object_starts.tolist() == [0, 2, 4, 6, 8]


def test_objects_without_an_extent_are_dropped_and_counted(rectangles):
    def flatten_three(content):
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][1]["bbox"][3] = 0
        content["annotations"][2]["segmentation"] = [[1, 1, 5, 5]]

    train, _ = read(rectangles(flatten_three))
    assert (train.dropped, len(train.labels)) == (3, 5)
    assert list(train.objects(0)) == []


@pytest.mark.promise("labels")
@pytest.mark.parametrize("width", [5.7e-14, 1e-6])
def test_a_box_that_float32_takes_for_a_line_is_dropped_and_counted(width, rectangles):
    train, _ = read(rectangles(lambda content: content["annotations"][0]["bbox"].__setitem__(2, width)))
    assert (train.dropped, len(train.labels)) == (1, 7)


@pytest.mark.promise("labels")
def test_whole_numbers_may_be_written_with_a_point(rectangles):
    def write_floats(content):
        for annotation in content["annotations"]:
            annotation["category_id"], annotation["image_id"] = float(annotation["category_id"]), annotation["image_id"]
        content["categories"][0]["id"] = 8.0
        content["images"][0]["width"] = float(content["images"][0]["width"])

    train, _ = read(rectangles(write_floats))
    assert train.classes == {3: "red", 8: "blue"}
    assert train.labels.tolist() == [1, 2] * 4


@pytest.mark.promise("labels")
@pytest.mark.parametrize("place", ["my_train/annotations.json", "my_train/images/00.png"])
def test_a_pipe_among_the_files_is_named_instead_of_waited_for(place, rectangles):
    data = rectangles()
    (data / place).unlink()
    os.mkfifo(data / place)
    with pytest.raises(InputError, match=f"{place}: is a named pipe"):
        read(data)


def test_a_box_that_reaches_a_little_beyond_the_image_is_clipped(rectangles):
    def reach_beyond(content):
        content["annotations"][0]["bbox"] = [-1.5, 2, 20, 20]

    train, _ = read(rectangles(reach_beyond))
    assert train.boxes[0].tolist() == [0, 2, 18.5, 22]


def test_the_area_is_the_annotated_one_or_else_the_masks(rectangles):
    def forget(content):
        content["annotations"][0]["area"] = 7.5
        del content["annotations"][1]["area"]

    train, _ = read(rectangles(forget))
    left, top, right, bottom = train.boxes[1]
    assert train.areas[:2].tolist() == [7.5, (right - left) * (bottom - top)]


def test_images_without_objects_are_trained_on_but_images_with_crowds_alone_are_not(rectangles):
    def make_crowds(content):
        content["annotations"] = content["annotations"][2:]  # image 0 has nothing
        content["annotations"][0]["iscrowd"] = content["annotations"][1]["iscrowd"] = 1  # image 1 two crowds
        content["annotations"][2]["iscrowd"] = 1  # image 2 one, and an object

    train, _ = read(rectangles(make_crowds))
    assert train.trainable_images() == [0, 2, 3]


def test_cocos_own_layout_is_recognised(rectangles):
    data = rectangles()
    (data / "annotations").mkdir()
    for split in ("train", "val"):
        (data / f"my_{split}" / "annotations.json").rename(data / "annotations" / f"instances_{split}2017.json")
        (data / f"my_{split}" / "images").rename(data / f"{split}2017")
    train, val = read(data)
    assert (len(train), len(val)) == (4, 2)
    assert train.path(0) == data / "train2017" / "00.png"


def set_in_annotation(index, key, value):
    return lambda content: content["annotations"][index].__setitem__(key, value)


def set_in_image(key, value):
    return lambda content: content["images"][1].__setitem__(key, value)


def drop_category(content):
    content["categories"] = [category for category in content["categories"] if category["id"] == 3]
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["category_id"] == 3]


def mark_all_as_crowds(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def remove_images_and_annotations(content):
    content["images"].clear()
    content["annotations"].clear()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


RLE_OF_ANOTHER_SIZE = {"size": [5, 5], "counts": [25]}
BAD = {
    "image that does not exist": (set_in_annotation(2, "image_id", 999), "annotation 3: there is no image 999"),
    "category that does not exist": (set_in_annotation(2, "category_id", 5), "annotation 3: there is no category 5"),
    "negative width": (set_in_annotation(3, "bbox", [20, 5, -4, 9]), "annotation 4: its bbox [20.0, 5.0, -4.0, 9.0]"),
    "box outside": (set_in_annotation(3, "bbox", [20, 5, 400, 9]), "annotation 4: its bbox [20.0, 5.0, 400.0, 9.0]"),
    "box to the left": (set_in_annotation(3, "bbox", [-9, 5, 4, 9]), "annotation 4: its bbox [-9.0, 5.0, 4.0, 9.0]"),
    "huge box": (set_in_annotation(3, "bbox", [20, 5, 1e300, 1e300]), "annotation 4: its bbox [20.0, 5.0, 1e+300,"),
    "no box": (set_in_annotation(3, "bbox", None), "Expected `array`, got `null` - at `$.annotations[3].bbox`"),
    "box of three numbers": (set_in_annotation(3, "bbox", [1, 2, 3]), "length 4"),
    "box with infinity": (set_in_annotation(3, "bbox", [1, 2, 3, float("inf")]), "not JSON"),
    "box with NaN": (set_in_annotation(3, "bbox", [1, 2, float("nan"), 3]), "not JSON"),
    "box as text": (set_in_annotation(3, "bbox", ["1", 2, 3, 4]), "got `str` - at `$.annotations[3].bbox[0]`"),
    "category id with a fraction": (set_in_annotation(2, "category_id", 3.5), "annotation 3: its category_id is 3.5;"),
    "endless category id": (
        set_in_annotation(2, "category_id", 10**300),
        "there is no category 1000000000000000000000000",
    ),
    "no mask": (set_in_annotation(3, "segmentation", []), "annotation 4: has no segmentation"),
    "mask as text": (set_in_annotation(3, "segmentation", "x"), "annotation 4: its segmentation is neither polygons"),
    "deep mask": (
        lambda content: content["annotations"][3].__setitem__("segmentation", nested(500)),
        "annotation 4: its segmentation is neither polygons",
    ),
    "zigzag": (
        set_in_annotation(3, "segmentation", [[0, 0, 59, 59] * 20_000]),
        "its polygons are 4.76e+06 pixels",
    ),
    "many long outlines": (
        lambda content: content["annotations"].extend(
            {**content["annotations"][0], "segmentation": [[0, 0, 59, 59] * 500]} for _ in range(9)
        ),
        "those of its image so far",
    ),
    "mask of another size": (set_in_annotation(3, "segmentation", RLE_OF_ANOTHER_SIZE), "annotation 4: its RLE"),
    "no annotation": (lambda content: content["annotations"].clear(), "holds no annotation"),
    "crowds alone": (mark_all_as_crowds, "none of its 8 annotations"),
    "no image": (remove_images_and_annotations, "names no image"),
    "no categories": (lambda content: content.pop("categories"), "missing required field `categories`"),
    "an id twice": (set_in_image("id", 100), "image entries have the id 100"),
    "id as text": (set_in_image("id", "101"), "got `str` - at `$.images[1].id`"),
    "no size": (set_in_image("width", None), "got `null` - at `$.images[1].width`"),
    "endless size": (set_in_image("width", 10**30), "image '01.png' has width 1000000000000000000000000..."),
    "more pixels than are decoded": (lambda c: c["images"][1].update(width=60000, height=60000), "at most 128 Mpx"),
    "another size": (set_in_image("width", 50), "says 50 x"),
    "missing image": (set_in_image("file_name", "gone.png"), "gone.png: missing"),
    "val has more categories": (drop_category, "its category 8, 'blue'"),
    "a category of another name": (lambda c: c["categories"][0].update(name="green"), "where the id 8 is 'green'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_end_in_one_line_with_the_file_and_the_problem(case, rectangles):
    change, problem = BAD[case]
    data = rectangles(change)
    with pytest.raises(InputError) as caught:
        read(data)
    message = str(caught.value)
    assert problem in message
    assert str(data) in message
    assert "\n" not in message


def test_missing_images_are_counted(rectangles):
    data = rectangles()
    for name in ("01.png", "03.png"):
        (data / "my_train" / "images" / name).unlink()
    with pytest.raises(InputError, match=r"01\.png: missing, .*2 of 4"):
        read(data)


def test_a_file_that_is_not_an_image_is_named(rectangles):
    data = rectangles()
    (data / "my_val" / "images" / "00.png").write_text("no image")
    with pytest.raises(InputError, match=r"00\.png: not an image"):
        read(data)


def test_a_photo_that_exif_turns_is_measured_upright(rectangles):
    data = rectangles()
    content = json.loads((data / "my_train" / "annotations.json").read_text())
    width, height = content["images"][0]["width"], content["images"][0]["height"]
    path = data / "my_train" / "images" / "00.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    stored_on_its_side = np.zeros((width, height, 3), dtype=np.uint8)
    Image.fromarray(stored_on_its_side).save(path, exif=exif)
    read(data)
    stored_upright = np.zeros((height, width, 3), dtype=np.uint8)
    Image.fromarray(stored_upright).save(path, exif=exif)
    with pytest.raises(InputError, match=r"00\.png: .*EXIF"):
        read(data)


@pytest.mark.parametrize(
    ("break_layout", "problem"),
    [
        (lambda data: (data / "my_train" / "annotations.json").unlink(), "annotations.json: missing"),
        (lambda data: (data / "my_train" / "annotations.json").write_text("{"), "not JSON"),
        (lambda data: (data / "my_train" / "annotations.json").write_text("[]"), "Expected `object`, got `array`"),
        (lambda data: (data / "my_train" / "annotations.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda data: (data / "my_train").rename(data / "mine"), "no folder whose name ends in 'train'"),
        (lambda data: (data / "other_val").mkdir(), "has 2 folders"),
        (lambda data: (data / "my_val" / "images").rename(data / "my_val" / "photos"), "images: no such folder"),
        (lambda data: (data / "annotations").mkdir(), "instances_train2017.json: missing"),
    ],
)
def test_a_layout_with_a_missing_part_is_refused_with_its_name(break_layout, problem, rectangles):
    data = rectangles()
    break_layout(data)
    with pytest.raises(InputError) as caught:
        read(data)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no-such: does not exist"):
        find_splits(tmp_path / "no-such")
