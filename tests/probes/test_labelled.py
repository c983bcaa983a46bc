import pytest

from fastmae.errors import InputError
from fastmae.probes.labelled import open_labelled


@pytest.fixture
def write_folder(tmp_path):
    """(class folder -> image names) -> a folder with these empty files below train/ and val/."""

    def write(**files):
        for name, images in files.items():
            folder = tmp_path / name.replace("_", "/")
            folder.mkdir(parents=True)
            for image in images:
                (folder / image).touch()
        return tmp_path

    return write


def test_labels_are_indices_into_the_sorted_classes_of_train(write_folder):
    data = open_labelled(
        write_folder(train_dog=["1.jpg"], train_cat=["2.png", "1.jpg"], val_dog=["1.jpg", "2.webp", "notes.txt"])
    )
    assert data.classes == ["cat", "dog"]
    assert [(path.parent.name, path.name) for path in data.train] == [
        ("cat", "1.jpg"),
        ("cat", "2.png"),
        ("dog", "1.jpg"),
    ]
    assert data.train_labels.tolist() == [0, 0, 1]
    assert [path.name for path in data.val] == ["1.jpg", "2.webp"]
    assert data.val_labels.tolist() == [1, 1]
    assert data.describe() == {"classes": ["cat", "dog"], "train": 3, "val": 2}


A, B = ["a.jpg"], ["b.jpg"]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"train_cat": A, "train_dog": B}, "val"),
        ({"val_cat": A, "val_dog": B}, "train"),
        ({"train_cat": A, "train_dog": B, "val_cat": A, "val_zebra": A}, "val/zebra"),
        ({"train_cat": A, "train_dog": B, "train_empty": [], "val_cat": A}, "train/empty"),
        ({"train_cat": A, "val_cat": B}, "train"),
        ({"train": A, "val_cat": B}, "train"),
    ],
    ids=["no val", "no train", "class only in val", "empty class", "one class", "no class folders"],
)
def test_a_folder_that_cannot_be_learnt_from_is_named(files, named, write_folder):
    with pytest.raises(InputError, match=named):
        open_labelled(write_folder(**files))
