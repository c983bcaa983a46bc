import os

import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate import file_checks
from fastmae.evaluate.file_checks import map_in_threads, upright_size
from fastmae.runtime.progress import Progress


@pytest.mark.parametrize(("orientation", "size", "swapped"), [(1, (30, 20), False), (6, (20, 30), True)])
def test_the_size_of_an_image_is_that_after_exif_has_turned_it(orientation, size, swapped, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert upright_size(tmp_path / "photo.jpg", "remove it") == (size, swapped)


@pytest.mark.promise("images")
@pytest.mark.parametrize(("name", "reason"), [("pipe.jpg", "is a named pipe, not a file"), ("x.jpg", "not an image")])
def test_what_is_no_image_is_refused_with_the_way_out(name, reason, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=rf"{name}: {reason}.*; remove it"):
        upright_size(tmp_path / name, "remove it")


def test_results_come_in_the_order_of_the_items_across_chunks(monkeypatch):
    monkeypatch.setattr(file_checks, "CHUNK", 4)
    with Progress("check", "items", 10, quiet=True) as progress:
        assert list(map_in_threads(lambda item: 2 * item, range(10), 3, progress)) == list(range(0, 20, 2))
    assert progress.done == 10


def test_no_chunk_is_started_after_the_first_error(monkeypatch):
    monkeypatch.setattr(file_checks, "CHUNK", 4)
    started = []

    def check(item):
        started.append(item)
        if item == 2:
            raise ValueError("the third item")

    with Progress("check", "items", 100, quiet=True) as progress, pytest.raises(ValueError, match="third"):
        list(map_in_threads(check, range(100), 2, progress))
    assert max(started) < 4
