import pickle
from pathlib import Path

import pytest

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.images.entries import entry_of, key_of, label_of
from fastmae.images.image_list import ImageList, write_list
from fastmae.images.sources import labelled_split, list_images, open_source


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
    (tmp_path / "here" / "gone").symlink_to(
        tmp_path / "nowhere"
    )  # a dangling link without a suffix: named later, when it is read
    assert list_images(tmp_path / "here") == ["cat/1.jpg", "cat/back/dog/2.jpg", "dog/2.jpg", "gone"]


def test_an_empty_or_missing_folder_is_an_input_error(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(InputError, match="no image file"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "none")
    with pytest.raises(InputError, match="is a file"):
        list_images(tmp_path / "notes.txt")


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


def test_a_folder_gives_the_same_list_as_before_and_opens_each_file(tmp_path):
    touch(
        tmp_path / "photos",
        "b/2.JPG",
        "a/1.png",
        "a/deep/3.webp",
        "no_suffix",
        "notes.txt",
        ".git/4.jpg",
        "a!/x.gif",
        "ünï 名.tif",
    )
    source = open_source(tmp_path / "photos")
    assert (source.kind, source.path) == ("folder", tmp_path / "photos")
    paths = list_images(tmp_path / "photos")
    info = write_list(source.entries(), tmp_path / "list")
    assert info.images == len(paths)
    entries = list(ImageList(tmp_path / "list"))
    assert [key_of(entry) for entry in entries] == paths
    again = pickle.loads(pickle.dumps(source))
    for entry in entries:
        with again.open(entry) as file:
            assert file.read() == b"x"


def test_names_that_are_no_utf8_or_hold_line_ends_keep_their_bytes(tmp_path):
    touch(tmp_path, "caf\udce9.jpg", "new\nline.jpg", "tab\t.jpg")
    source = open_source(tmp_path)
    entries = sorted(source.entries())
    assert entries == [b"caf\xe9.jpg", b"new\nline.jpg", b"tab\t.jpg"]
    for entry in entries:
        source.open(entry).close()


def test_a_name_with_the_byte_that_ends_a_key_is_refused(tmp_path):
    touch(tmp_path, "a\x01b.jpg")
    with pytest.raises(InputError, match="holds a byte 0 or 1; rename the image"):
        list(open_source(tmp_path).entries())
    with pytest.raises(InputError, match="holds a byte 0 or 1"):
        entry_of(tmp_path, "a\0b")


@pytest.mark.parametrize("key", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "..", "a/.."])
def test_a_key_never_leads_out_of_the_folder(key, tmp_path):
    touch(tmp_path, "secret.jpg", "photos/a/1.jpg")
    with pytest.raises(InputError, match="outside this folder"):
        open_source(tmp_path / "photos").open(key.encode())


def test_a_missing_image_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path).open(b"none.jpg")


def test_a_source_is_recognised_by_what_the_path_is(tmp_path):
    touch(
        tmp_path,
        "flat/1.jpg",
        "flat/x.tar",
        "flat/x.tar.gz",
        "tars/x.tar",
        "deep/a/1.jpg",
        "deep/x.tar.gz",
        "empty/notes.md",
    )
    touch(
        tmp_path,
        "list.txt",
        "list.CSV",
        "list.tsv",
        "list.parquet",
        "one.tar",
        "info/state.json",
        "info/dataset_info.json",
    )
    touch(tmp_path, "info/1.jpg", "splits/dataset_dict.json", "half/state.json")
    kinds = {
        "folder": ["flat", "deep", "empty", "half"],
        "tar": ["tars", "one.tar"],
        "list": ["list.txt", "list.CSV", "list.tsv", "list.parquet"],
        "datasets": ["info", "splits"],
    }
    for kind, names in kinds.items():
        assert {name: open_source(tmp_path / name).kind for name in names} == dict.fromkeys(names, kind)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none", "none: does not exist"),
        ("1.jpg", "1.jpg: is one image; give a folder"),
        ("notes.md", "notes.md: is a file of another kind; give a folder of images, a .tar, or a list"),
        ("mixed", r"mixed: holds tars \(x.tar\) and loose images \(a/1.jpg\)"),
    ],
)
def test_what_is_no_source_says_what_to_give(path, says, tmp_path):
    touch(tmp_path, "1.jpg", "notes.md", "mixed/x.tar", "mixed/a/1.jpg")
    with pytest.raises(InputError, match=says):
        open_source(tmp_path / path)


def test_the_label_is_the_folder_that_holds_the_image():
    keys = {
        "cat/1.jpg": "cat",
        "a/dog/1.jpg": "dog",
        "1.jpg": "",
        "0.tar/1.jpg": "",
        "0.tar/./cat/1.jpg": "cat",
        "/d/cat/1.jpg": "cat",
        "/1.jpg": "",
    }
    assert {key: label_of(key) for key in keys} == keys


def test_a_source_given_from_below_is_kept_as_a_whole_path(photos, vit_weights, tmp_path, monkeypatch, capsys):
    here = tmp_path / "work" / "deep"
    here.mkdir(parents=True)
    (tmp_path / "work" / "pictures").symlink_to(photos / "val")
    monkeypatch.chdir(here)
    assert open_source(Path("../pictures")).path == photos / "val"
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    assert run(["tokenize", "../pictures", "../a.tokens", *teacher, "--middle-size", "32", "--workers", "0"]) == 0
    assert run(["inspect", "../a.tokens"]) == 0
