import errno
import io
import os
import socket
from pathlib import Path

import pytest

from fastmae.errors import InputError
from fastmae.images.decode import UndecodableError
from fastmae.images.reading import Skipped, read_or_refuse, read_or_skip
from fastmae.images.sources import open_source


class FailingSource:
    kind, path = "tar", Path("x.tar")

    def __init__(self, error):
        self.error = error

    def open(self, entry):
        raise self.error


def read(file):
    return file.read()


def test_a_readable_image_gives_what_the_reader_returns_and_its_file_is_closed(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"one")
    files = []
    assert read_or_skip(open_source(tmp_path), b"1.jpg", lambda file: files.append(file) or file.read()) == b"one"
    assert files[0].closed


def test_an_undecodable_image_is_skipped_with_the_decoders_reason(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"no image")

    def fail(file: io.BufferedReader):
        raise UndecodableError("not an image")

    assert read_or_skip(open_source(tmp_path), b"1.jpg", fail) == Skipped("not an image")


def test_a_listed_path_without_a_file_is_skipped(tmp_path):
    (tmp_path / "list.txt").write_text("gone.jpg\n.\n")
    gone, folder = open_source(tmp_path / "list.txt").entries()
    assert read_or_skip(open_source(tmp_path / "list.txt"), gone, read) == Skipped("no such file")
    assert isinstance(read_or_skip(open_source(tmp_path / "list.txt"), folder, read), Skipped)


def test_a_dangling_link_is_skipped_but_a_file_that_vanished_from_its_folder_is_an_error(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert isinstance(read_or_skip(open_source(tmp_path), b"link.jpg", read), Skipped)
    with pytest.raises(FileNotFoundError):
        read_or_skip(open_source(tmp_path), b"vanished.jpg", read)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP])
def test_an_image_that_the_system_refuses_to_open_is_skipped_with_the_systems_reason(number):
    skipped = read_or_skip(FailingSource(OSError(number, "the reason")), b"x", read)
    assert skipped == Skipped("can't be read: the reason")


@pytest.mark.promise("images")
def test_what_is_no_file_among_the_images_is_skipped_and_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.jpg"))  # its path may not be long
    (tmp_path / "list.txt").write_text("pipe.jpg\nloop.jpg\ndevice.jpg\nsocket.jpg\n")
    for source in (open_source(tmp_path), open_source(tmp_path / "list.txt")):
        assert {entry: read_or_skip(source, entry, read) for entry in source.entries()} == {
            b"pipe.jpg": Skipped("is a named pipe, not a file"),
            b"loop.jpg": Skipped("can't be read: Too many levels of symbolic links"),
            b"device.jpg": Skipped("is a device, not a file"),
            b"socket.jpg": Skipped("is a socket, not a file"),
        }


@pytest.mark.promise("machine")
def test_memory_that_is_exhausted_is_not_blamed_on_the_image(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"one")

    def fail(file: io.BufferedReader):
        raise MemoryError

    for refuse in (
        lambda: read_or_skip(open_source(tmp_path), b"1.jpg", fail),
        lambda: read_or_refuse(tmp_path / "1.jpg", fail, "remove it"),
    ):
        with pytest.raises(InputError, match=r"1\.jpg: not enough memory to decode it; use fewer --workers"):
            refuse()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_a_fault_of_the_machine_is_never_blamed_on_the_image(number):
    with pytest.raises(OSError) as caught:
        read_or_skip(FailingSource(OSError(number, "the reason")), b"x", read)
    assert caught.value.errno == number
