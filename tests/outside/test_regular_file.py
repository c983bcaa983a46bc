import os
import socket

import pytest

from fastmae.errors import InputError
from fastmae.outside.regular_file import NotRegularError, open_regular, read_bounded

pytestmark = pytest.mark.promise("files")


def test_a_regular_file_is_read_to_its_end(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 3) == b"abc"
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"


def test_a_file_above_the_limit_is_refused_with_its_size(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(5_000_000)
    with pytest.raises(InputError, match=r"large: has 5 MB, more than the 1 MB"):
        read_bounded(tmp_path / "large", 1_000_000)


@pytest.mark.timeout(10)
def test_pipes_sockets_and_devices_are_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name, kind in (("pipe", "a named pipe"), ("socket", "a socket"), ("zero", "a device")):
            with pytest.raises(NotRegularError, match=f"{name}: is {kind}, not a file"):
                open_regular(tmp_path / name)


def test_a_folder_and_a_missing_file_are_the_errors_of_open(tmp_path):
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
