import hashlib
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from fastmae.errors import InputError
from fastmae.images import image_list as image_list_module
from fastmae.images.entries import LONGEST_ENTRY, key_of
from fastmae.images.image_list import ImageList, ListInfo, new_entries, write_list

PATHS = [f"class {n % 7}/photo {n:04d}.jpg" for n in range(1000)]


@pytest.fixture
def tiny_runs(monkeypatch):
    """About ten entries fill the memory, and three runs are merged at a time."""
    monkeypatch.setattr(image_list_module, "RUN_BYTES", 600)
    monkeypatch.setattr(image_list_module, "MAX_RUNS", 3)
    monkeypatch.setattr(image_list_module, "CHUNK", 64)


def expected_sha256(paths):
    return hashlib.sha256(b"".join(path.encode() + b"\0" for path in paths)).hexdigest()


def write_and_read(entries, file):
    info = write_list(entries, file)
    return info, file.read_bytes()


def encoded(paths):
    return [path.encode() for path in paths]


def test_a_list_holds_the_sorted_entries_and_its_digest_covers_the_sorted_keys(tmp_path):
    info, content = write_and_read(encoded(PATHS), tmp_path / "list")
    assert content == b"".join(path + b"\0" for path in sorted(encoded(PATHS)))
    assert info == ListInfo(1000, expected_sha256(sorted(PATHS)))
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_the_list_depends_neither_on_the_order_nor_on_how_many_entries_fit_in_memory(tmp_path, monkeypatch, tiny_runs):
    shuffled = random.Random(0).sample(PATHS, len(PATHS))
    merged = write_and_read(encoded(shuffled), tmp_path / "list")
    assert [path.name for path in tmp_path.iterdir()] == ["list"]
    assert len(ImageList(tmp_path / "list")) == 1000
    monkeypatch.setattr(image_list_module, "RUN_BYTES", 10**8)
    assert write_and_read(encoded(PATHS), tmp_path / "list") == merged
    monkeypatch.setattr(image_list_module, "RUN_BYTES", 1)
    assert write_and_read(encoded(shuffled), tmp_path / "list") == merged


@pytest.mark.parametrize("fits_in_memory", [True, False])
def test_of_entries_with_the_same_key_the_last_in_byte_order_is_kept(fits_in_memory, tmp_path, request):
    if not fits_in_memory:
        request.getfixturevalue("tiny_runs")
    entries = [f"{n % 40:02d}\x01{n // 40},7".encode() for n in range(400)]
    contents = {write_and_read(random.Random(seed).sample(entries, 400), tmp_path / "list")[1] for seed in range(4)}
    assert contents == {b"".join(f"{n:02d}\x019,7\0".encode() for n in range(40))}


def test_locations_affect_neither_the_order_nor_the_digest(tmp_path):
    names = ["a", "a!", "a.jpg", "a\x02", "b"]
    plain, _ = write_and_read(encoded(names), tmp_path / "plain")
    located, content = write_and_read([name.encode() + b"\x01999,9" for name in names], tmp_path / "located")
    assert plain == located == ListInfo(5, hashlib.sha256(b"a\0a\x02\0a!\0a.jpg\0b\0").hexdigest())
    assert [key_of(entry) for entry in content.split(b"\0")[:-1]] == ["a", "a\x02", "a!", "a.jpg", "b"]


def test_without_entries_the_file_stays_as_it_was(tmp_path):
    assert write_list([], tmp_path / "list").images == 0
    assert not (tmp_path / "list").exists()
    write_and_read([b"a"], tmp_path / "list")
    assert write_list(iter(()), tmp_path / "list") == ListInfo(0, expected_sha256([]))
    assert (tmp_path / "list").read_bytes() == b"a\0"


def test_a_source_that_fails_while_listing_leaves_no_file_behind(tmp_path, tiny_runs):
    def entries():
        yield from encoded(PATHS[:555])
        raise InputError("photos.tar: cut off")

    with pytest.raises(InputError, match="cut off"):
        write_list(entries(), tmp_path / "list")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_with_its_folder(tmp_path, monkeypatch, tiny_runs):
    class Full:
        def writelines(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_list_module.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match="No space") as caught:
        write_list(encoded(PATHS), tmp_path / "list")
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 512, 1000])
def test_every_slice_of_a_list_is_that_slice_of_the_sorted_entries(length, tmp_path, monkeypatch):
    monkeypatch.setattr(image_list_module, "CHUNK", 1000)
    entries = sorted(encoded(PATHS[:length]))
    write_list(entries, tmp_path / "list")
    images = ImageList(tmp_path / "list")
    assert len(images) == length
    assert list(images) == entries
    assert images.sha256() == expected_sha256([entry.decode() for entry in entries])
    edges = [index for index in (0, 1, 17, 254, 255, 256, 257, 511, 512, 513, 999) if index < length] + [length]
    for start in edges:
        for stop in edges:
            if start <= stop:
                assert images.slice(start, stop) == entries[start:stop]


def test_a_list_can_be_read_after_pickling_and_in_forked_processes(tmp_path):
    entries = sorted(encoded(PATHS))
    write_list(entries, tmp_path / "list")
    images = ImageList(tmp_path / "list")
    assert images.slice(300, 302) == entries[300:302]  # opens the file, which the forked processes share
    assert len(pickle.dumps(images)) < 1000
    assert pickle.loads(pickle.dumps(images)).slice(998, 1000) == entries[998:]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as processes:
        slices = processes.map(images.slice, range(0, 990, 3), range(10, 1000, 3))
        assert list(slices) == [entries[start : start + 10] for start in range(0, 990, 3)]


@pytest.mark.parametrize(
    "content", [b"", b"a.jpg\0b.jpg", b"\0", b"a\0\0b\0", b"\0a\0", b"a\0" + b"b" * (LONGEST_ENTRY + 1) + b"\0c\0"]
)
def test_a_damaged_list_is_an_input_error(content, tmp_path, monkeypatch):
    (tmp_path / "list").write_bytes(content)
    for chunk in (1, 2, 100, 1 << 14):
        monkeypatch.setattr(image_list_module, "CHUNK", chunk)
        with pytest.raises(InputError, match="list: a damaged image list"):
            ImageList(tmp_path / "list")


def test_a_list_that_is_out_of_order_or_changes_while_in_use_is_an_input_error(tmp_path):
    (tmp_path / "list").write_bytes(b"b\0a\0")
    with pytest.raises(InputError, match="out of order"):
        list(ImageList(tmp_path / "list"))
    write_list(encoded(PATHS), tmp_path / "list")
    images = ImageList(tmp_path / "list")
    (tmp_path / "list").write_bytes(b"a\0")
    with pytest.raises(InputError, match="changed while in use"):
        images.slice(300, 400)


@pytest.mark.parametrize("fits_in_memory", [True, False])
def test_new_entries_are_those_whose_key_is_in_no_known_list(fits_in_memory, tmp_path, request):
    if not fits_in_memory:
        request.getfixturevalue("tiny_runs")
    write_list([path.encode() + b"\x017" for path in PATHS[::3]], tmp_path / "0")
    write_list(encoded(PATHS[1::3]), tmp_path / "1")
    known = [ImageList(tmp_path / name) for name in "01"]
    listed = random.Random(1).sample([*PATHS, "0 before all.jpg", "z after all.jpg", "z after all.jpg"], 1003)
    new = [key_of(entry) for entry in new_entries(encoded(listed), known, tmp_path)]
    assert new == sorted([*PATHS[2::3], "0 before all.jpg", "z after all.jpg", "z after all.jpg"])
    assert list(new_entries(encoded(PATHS[:2]), known, tmp_path)) == []
    assert list(new_entries([], known, tmp_path)) == []
    assert len(list(new_entries(encoded(PATHS), [], tmp_path))) == 1000


def test_entries_are_taken_as_a_stream(tmp_path, tiny_runs):
    assert write_list((b"%06d" % n for n in range(5000)), tmp_path / "list").images == 5000
