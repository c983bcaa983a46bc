from pathlib import Path

import pytest
import torch

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.images.sources import class_indices, labelled_split, list_images, open_source


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_source_is_recognised_by_what_the_path_is(tmp_path):
    touch(tmp_path, "flat/1.jpg", "flat/x.tar", "flat/x.tar.gz", "tars/x.tar", "deep/a/1.jpg", "deep/x.tar.gz")
    touch(tmp_path, "empty/notes.md", "list.txt", "list.CSV", "list.tsv", "list.parquet", "one.tar")
    touch(tmp_path, "info/state.json", "info/dataset_info.json", "info/1.jpg", "splits/dataset_dict.json")
    touch(tmp_path, "half/state.json")
    kinds = {
        "folder": ["flat", "deep", "empty", "half"],
        "tar": ["tars", "one.tar"],
        "list": ["list.txt", "list.CSV", "list.tsv", "list.parquet"],
        "datasets": ["info", "splits"],
    }
    for kind, names in kinds.items():
        assert {name: open_source(tmp_path / name).kind for name in names} == dict.fromkeys(names, kind)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "none: does not exist"),
        ("1.jpg", "1.jpg: is one image; give a folder"),
        ("notes.md", "notes.md: is a file of another kind; give a folder of images, a .tar, or a list"),
        ("mixed", r"mixed: holds tars \(x.tar\) and loose images \(a/1.jpg\)"),
    ],
)
def test_a_path_that_is_not_a_source_is_refused_and_the_message_says_what_to_give(path, message, tmp_path):
    touch(tmp_path, "1.jpg", "notes.md", "mixed/x.tar", "mixed/a/1.jpg")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / path)


def test_a_relative_path_with_parent_folders_is_stored_resolved(photos, vit_weights, tmp_path, monkeypatch):
    working_dir = tmp_path / "work" / "deep"
    working_dir.mkdir(parents=True)
    (tmp_path / "work" / "pictures").symlink_to(photos / "val")
    monkeypatch.chdir(working_dir)
    assert open_source(Path("../pictures")).path == photos / "val"
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    assert run(["tokenize", "../pictures", "../a.tokens", *teacher, "--middle-size", "32", "--workers", "0"]) == 0
    assert run(["inspect", "../a.tokens"]) == 0


def test_listing_an_empty_or_missing_folder_is_an_input_error(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(InputError, match="no image file"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "none")
    with pytest.raises(InputError, match="is a file"):
        list_images(tmp_path / "notes.txt")


def test_the_class_of_an_image_in_a_labelled_split_is_the_first_folder(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/x/2.jpg", "train/loose.jpg")
    paths, class_names = labelled_split(tmp_path, "train")
    assert class_names == ["cat", "dog"]
    assert [path.name for path in paths] == ["1.jpg", "2.jpg"]


def test_a_missing_split_and_a_class_without_an_image_are_refused_by_name(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/readme.txt")
    with pytest.raises(InputError, match=r"dog: no image"):
        labelled_split(tmp_path, "train")
    with pytest.raises(InputError, match="no folder 'val'"):
        labelled_split(tmp_path, "val")


def test_labels_are_indices_among_the_classes():
    labels = class_indices(["dog", "cat", "dog"], ["bird", "cat", "dog"])
    assert torch.equal(labels, torch.tensor([2, 1, 2]))
    assert class_indices([], ["cat"]).dtype == torch.int64
    with pytest.raises(KeyError):
        class_indices(["fish"], ["cat"])
