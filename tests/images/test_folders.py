import pickle

import pytest

from fastmae.errors import InputError
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList, write_list
from fastmae.images.sources import list_images, open_source


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_the_images_below_a_folder_are_listed_sorted_and_nothing_else(tmp_path):
    images = ["._5.jpg", "a/1.png", "a/deep/3.webp", "b/2.JPG", "no_suffix", "ünïcode 名.tif"]
    touch(tmp_path, *reversed(images), "notes.txt", ".hidden", ".git/4.jpg")
    assert list_images(tmp_path) == images


def test_linked_folders_are_followed_and_a_loop_of_links_ends(tmp_path):
    touch(tmp_path, "here/cat/1.jpg", "elsewhere/dog/2.jpg")
    (tmp_path / "here" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "here" / "cat" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "to").symlink_to(tmp_path / "here")
    # A dangling link without a suffix counts as an image, and is reported when it is read.
    (tmp_path / "here" / "gone").symlink_to(tmp_path / "nowhere")
    assert list_images(tmp_path / "here") == ["cat/1.jpg", "cat/back/dog/2.jpg", "dog/2.jpg", "gone"]


def test_the_image_list_of_a_folder_has_the_order_of_its_sorted_paths_and_each_image_opens(tmp_path):
    folder = tmp_path / "photos"
    touch(
        folder, "b/2.JPG", "a/1.png", "a/deep/3.webp", "no_suffix", "notes.txt", ".git/4.jpg", "a!/x.gif", "ünï 名.tif"
    )
    source = open_source(folder)
    assert (source.kind, source.path) == ("folder", folder)
    paths = list_images(folder)
    assert write_list(source.entries(), tmp_path / "list").images == len(paths)
    entries = list(ImageList(tmp_path / "list"))
    assert [key_of(entry) for entry in entries] == paths
    unpickled = pickle.loads(pickle.dumps(source))
    for entry in entries:
        with unpickled.open(entry) as file:
            assert file.read() == b"x"


def test_names_that_are_not_utf8_or_hold_line_ends_keep_their_bytes(tmp_path):
    touch(tmp_path, "caf\udce9.jpg", "new\nline.jpg", "tab\t.jpg")
    source = open_source(tmp_path)
    entries = sorted(source.entries())
    assert entries == [b"caf\xe9.jpg", b"new\nline.jpg", b"tab\t.jpg"]
    for entry in entries:
        source.open(entry).close()


def test_a_name_with_the_byte_that_ends_a_key_is_refused(tmp_path):
    touch(tmp_path, "a\x01b.jpg")
    with pytest.raises(InputError, match="rename the image"):
        list(open_source(tmp_path).entries())


@pytest.mark.parametrize("key", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "..", "a/.."])
def test_a_key_never_leads_out_of_the_folder(key, tmp_path):
    touch(tmp_path, "secret.jpg", "photos/a/1.jpg")
    with pytest.raises(InputError, match="outside this folder"):
        open_source(tmp_path / "photos").open(key.encode())


def test_a_missing_image_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path).open(b"none.jpg")
