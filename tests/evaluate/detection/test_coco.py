"""A split as it is read from annotations, and every way in which they can be wrong, in one line each."""

import json

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.detection.coco import find_splits, read_split


def read(data):
    """As the command does, before it trains."""
    train_files, val_files = find_splits(data)
    train = read_split(train_files)
    return train, read_split(val_files, train.classes)


def test_category_ids_with_holes_become_labels_from_1_in_their_order(rectangles):
    train, val = read(rectangles())
    assert train.classes == val.classes == {3: "red", 8: "blue"}
    assert train.labels.tolist() == [1, 2] * 4


def test_objects_lie_with_their_image_wherever_they_stand_in_the_file(rectangles):
    train, _ = read(rectangles(lambda content: content["annotations"].reverse()))
    assert train.labels.tolist() == [2, 1] * 4
    assert [list(train.objects(image)) for image in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert train.starts.tolist() == [0, 2, 4, 6, 8]


def test_degenerate_objects_are_dropped_and_counted(rectangles):
    def flatten_three(content):
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][1]["bbox"][3] = 0
        content["annotations"][2]["segmentation"] = [[1, 1, 5, 5]]

    train, _ = read(rectangles(flatten_three))
    assert (train.dropped, len(train.labels)) == (3, 5)
    assert list(train.objects(0)) == []


def test_a_box_that_reaches_a_little_over_the_edge_is_cut_there(rectangles):
    def reach(content):
        content["annotations"][0]["bbox"] = [-1.5, 2, 20, 20]

    train, _ = read(rectangles(reach))
    assert train.boxes[0].tolist() == [0, 2, 18.5, 22]


def test_the_area_is_the_files_or_the_masks(rectangles):
    def forget(content):
        content["annotations"][0]["area"] = 7.5
        del content["annotations"][1]["area"]

    train, _ = read(rectangles(forget))
    left, top, right, bottom = train.boxes[1]
    assert train.areas[:2].tolist() == [7.5, (right - left) * (bottom - top)]


def test_images_without_objects_are_trained_on_but_not_those_with_crowds_alone(rectangles):
    def make_crowds(content):
        content["annotations"] = content["annotations"][2:]  # image 0 has nothing
        content["annotations"][0]["iscrowd"] = content["annotations"][1]["iscrowd"] = 1  # image 1 two crowds
        content["annotations"][2]["iscrowd"] = 1  # image 2 one, and an object

    train, _ = read(rectangles(make_crowds))
    assert train.trainable() == [0, 2, 3]


def test_cocos_own_layout_is_recognised(rectangles):
    data = rectangles()
    (data / "annotations").mkdir()
    for split in ("train", "val"):
        (data / f"my_{split}" / "annotations.json").rename(data / "annotations" / f"instances_{split}2017.json")
        (data / f"my_{split}" / "images").rename(data / f"{split}2017")
    train, val = read(data)
    assert (len(train), len(val)) == (4, 2)
    assert train.path(0) == data / "train2017" / "00.png"


def put(place, key, value):
    return lambda content: content["annotations"][place].__setitem__(key, value)


def of_image(key, value):
    return lambda content: content["images"][1].__setitem__(key, value)


def drop_category(content):
    content["categories"] = [category for category in content["categories"] if category["id"] == 3]
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["category_id"] == 3]


BAD = {
    "image that does not exist": (put(2, "image_id", 999), "annotation 3: there is no image 999"),
    "category that does not exist": (put(2, "category_id", 5), "annotation 3: there is no category 5"),
    "negative width": (put(3, "bbox", [20, 5, -4, 9]), "annotation 4: its bbox [20, 5, -4, 9] has a negative size"),
    "box outside": (
        put(3, "bbox", [20, 5, 400, 9]),
        "annotation 4: its bbox [20, 5, 400, 9] lies outside its image of",
    ),
    "box left of it": (put(3, "bbox", [-9, 5, 4, 9]), "annotation 4: its bbox [-9, 5, 4, 9] lies outside its image of"),
    "no box": (put(3, "bbox", None), "annotation 4: its bbox is None"),
    "box of three": (put(3, "bbox", [1, 2, 3]), "annotation 4: its bbox is [1, 2, 3]"),
    "no mask": (put(3, "segmentation", []), "annotation 4: has no segmentation"),
    "mask of another size": (
        put(3, "segmentation", {"size": [5, 5], "counts": [25]}),
        "annotation 4: its RLE is of size [5, 5]",
    ),
    "no annotation": (lambda content: content["annotations"].clear(), "holds no annotation"),
    "crowds alone": (
        lambda content: [a.update(iscrowd=1) for a in content["annotations"]],
        "none of its 8 annotations is an object",
    ),
    "no image": (lambda content: (content["images"].clear(), content["annotations"].clear()), "names no image"),
    "no categories": (lambda content: content.pop("categories"), "not COCO annotations"),
    "one id twice": (of_image("id", 100), "two of its image entries have the id 100"),
    "id as text": (of_image("id", "101"), "image 1 of its list has no whole number 'id'"),
    "no size": (of_image("width", None), "image '01.png' has width None"),
    "another size": (of_image("width", 50), "says 50 x"),
    "image missing": (of_image("file_name", "gone.png"), "gone.png: missing, though"),
    "val has more classes": (drop_category, "its category 8, 'blue', is not one of train's, which lacks it"),
    "another name": (
        lambda c: c["categories"][0].update(name="green"),
        "category 8, 'blue', is not one of train's, where the id 8 is 'green'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_are_one_line_that_names_file_and_cause(case, rectangles):
    change, named = BAD[case]
    data = rectangles(change)
    with pytest.raises(InputError) as caught:
        read(data)
    message = str(caught.value)
    assert named in message
    assert str(data) in message
    assert "\n" not in message


def test_missing_images_are_counted(rectangles):
    data = rectangles()
    for name in ("01.png", "03.png"):
        (data / "my_train" / "images" / name).unlink()
    with pytest.raises(InputError, match=r"01\.png: missing, .* \(2 of the 4 images are\)"):
        read(data)


def test_a_file_that_is_no_image_is_named(rectangles):
    data = rectangles()
    (data / "my_val" / "images" / "00.png").write_text("no image")
    with pytest.raises(InputError, match=r"00\.png: not an image"):
        read(data)


def test_a_picture_on_its_side_counts_as_it_is_shown(rectangles):
    data = rectangles()
    content = json.loads((data / "my_train" / "annotations.json").read_text())
    width, height = content["images"][0]["width"], content["images"][0]["height"]
    path = data / "my_train" / "images" / "00.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((width, height, 3), dtype=np.uint8)).save(
        path, exif=exif
    )  # lying: shown, it is as annotated
    read(data)
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path, exif=exif)
    with pytest.raises(InputError, match="EXIF orientation turns it"):
        read(data)


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda data: (data / "my_train" / "annotations.json").unlink(), "annotations.json: missing"),
        (lambda data: (data / "my_train" / "annotations.json").write_text("{"), "can't be read as JSON"),
        (lambda data: (data / "my_train" / "annotations.json").write_text("[]"), "not COCO annotations"),
        (lambda data: (data / "my_train" / "annotations.json").write_bytes(b"\xff\xfe\x00"), "can't be read as JSON"),
        (lambda data: (data / "my_train").rename(data / "mine"), "no folder whose name ends in 'train'"),
        (lambda data: (data / "other_val").mkdir(), "has 2 folders whose names end in 'val' (my_val, other_val)"),
        (lambda data: (data / "my_val" / "images").rename(data / "my_val" / "photos"), "images: no such folder"),
        (lambda data: (data / "annotations").mkdir(), "instances_train2017.json: missing"),
    ],
)
def test_a_layout_with_a_part_missing_is_named(break_it, named, rectangles):
    data = rectangles()
    break_it(data)
    with pytest.raises(InputError) as caught:
        read(data)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_data_at_all_is_named(tmp_path):
    with pytest.raises(InputError, match="no-such: does not exist"):
        find_splits(tmp_path / "no-such")
