import pytest

from fastmae.errors import InputError
from fastmae.images.sources import labelled_split, list_digest, list_images


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_lists_images_below_a_folder_sorted_and_nothing_else(tmp_path):
    touch(
        tmp_path,
        "b/2.JPG",
        "a/1.png",
        "a/deep/3.webp",
        "no_suffix",
        "notes.txt",
        ".hidden",
        ".git/4.jpg",
        "._5.jpg",
        "ünïcode 名.tif",
    )
    assert list_images(tmp_path) == ["._5.jpg", "a/1.png", "a/deep/3.webp", "b/2.JPG", "no_suffix", "ünïcode 名.tif"]


def test_linked_folders_are_followed_and_a_loop_of_links_ends(tmp_path):
    touch(tmp_path, "here/cat/1.jpg", "elsewhere/dog/2.jpg")
    (tmp_path / "here" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "here" / "cat" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "to").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "gone").symlink_to(tmp_path / "nowhere")  # a dangling link without a suffix: named later, when it is read
    assert list_images(tmp_path / "here") == ["cat/1.jpg", "cat/back/dog/2.jpg", "dog/2.jpg", "gone"]


def test_an_empty_or_missing_folder_is_an_input_error(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(InputError, match="no image file"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "none")
    with pytest.raises(InputError, match="is a file"):
        list_images(tmp_path / "notes.txt")


def test_the_digest_depends_on_names_and_order():
    digests = {list_digest(paths) for paths in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"])}
    assert len(digests) == 4


def test_a_labelled_split_gives_the_first_folder_as_class(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/x/2.jpg", "train/loose.jpg")
    paths, labels = labelled_split(tmp_path, "train")
    assert labels == ["cat", "dog"]
    assert [path.name for path in paths] == ["1.jpg", "2.jpg"]


def test_a_class_without_an_image_is_named(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/readme.txt")
    with pytest.raises(InputError, match=r"dog: no image"):
        labelled_split(tmp_path, "train")
    with pytest.raises(InputError, match="no folder 'val'"):
        labelled_split(tmp_path, "val")
