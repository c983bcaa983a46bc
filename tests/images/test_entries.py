import pytest

from fastmae.errors import InputError
from fastmae.images.entries import entry_of, key_of, label_of, numbers_of


def test_key_and_location_are_read_back_from_an_entry(tmp_path):
    assert entry_of(tmp_path, "a/1.jpg") == b"a/1.jpg"
    entry = entry_of(tmp_path, "caf\udce9 名.jpg", "512,3")
    assert key_of(entry) == "caf\udce9 名.jpg"
    assert numbers_of(entry, 2, tmp_path) == (512, 3)


@pytest.mark.parametrize("key", ["a\0b", "a\x01b", b"a\x01b"])
def test_a_key_with_a_reserved_byte_is_refused(key, tmp_path):
    with pytest.raises(InputError, match="holds a byte 0 or 1"):
        entry_of(tmp_path, key)


@pytest.mark.parametrize(
    "location", [b"", b"\x01", b"\x015", b"\x01-5,3", b"\x01a,b", b"\x011,2,3", b"\x01" + b"9" * 20 + b",1"]
)
def test_a_location_other_than_the_expected_numbers_is_refused(location, tmp_path):
    with pytest.raises(InputError, match="does not say where"):
        numbers_of(b"x.jpg" + location, 2, tmp_path)


def test_the_label_is_the_folder_that_holds_the_image():
    labels = {
        "cat/1.jpg": "cat",
        "a/dog/1.jpg": "dog",
        "1.jpg": "",
        "0.tar/1.jpg": "",
        "0.tar/./cat/1.jpg": "cat",
        "/d/cat/1.jpg": "cat",
        "/1.jpg": "",
    }
    assert {key: label_of(key) for key in labels} == labels
