"""Files appear whole or not at all, and a killed writer's parts are told apart from a running writer's."""

import os
import socket

import pytest

from fastmae.runtime.durable import ABANDONED_AFTER, holds_anything, remove_parts, write_new, write_whole

HOST = socket.gethostname().replace(".", "-")
NO_PROCESS = 4194304  # Linux's process numbers are smaller


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, lambda part: part.write_text("old"))

    def fill_the_disk(part):
        part.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.json"):
        write_whole(path, fill_the_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_the_first_new_file_of_a_name_stays(has_hard_links, tmp_path, monkeypatch):
    def link(part, path):
        raise OSError(1, "Operation not permitted", str(path))

    if not has_hard_links:
        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "owner"
    write_new(path, b"first")
    if has_hard_links:
        write_new(path, b"second")
    else:
        with pytest.raises(OSError, match="owner"):
            write_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_only_parts_whose_writer_is_gone_are_removed(tmp_path):
    parts = {
        "this machine, killed": f"0.safetensors.{HOST}.{NO_PROCESS}.part",
        "this machine, running": f"1.safetensors.{HOST}.{os.getppid()}.part",
        "another machine, new": f"2.safetensors.elsewhere.{NO_PROCESS}.part",
        "another machine, old": f"3.safetensors.elsewhere.{NO_PROCESS}.part",
        "no process's number": f"4.safetensors.{HOST}.{10**20}.part",
        "zero": f"5.safetensors.{HOST}.0.part",
        "the user's own": "film.part",
    }
    for name in parts.values():
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f"folder.{HOST}.{NO_PROCESS}.part").mkdir()
    old = (tmp_path / parts["another machine, old"]).stat().st_mtime - 2 * ABANDONED_AFTER
    os.utime(tmp_path / parts["another machine, old"], (old, old))
    assert not holds_anything(tmp_path)
    remove_parts(tmp_path)
    kept = {name for name, part in parts.items() if (tmp_path / part).exists()}
    assert kept == {"this machine, running", "another machine, new", "the user's own"}
