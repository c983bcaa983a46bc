"""Files appear whole or not at all, and what a killed writer left is told from what a living one is writing."""

import os
import socket

import pytest

from fastmae.runtime.durable import ABANDONED_AFTER, holds_anything, remove_parts, write_whole

HOST = socket.gethostname().replace(".", "-")
NOBODY = 4194304  # Linux gives out numbers below it


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, lambda aside: aside.write_text("old"))

    def half(aside):
        aside.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.json"):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_parts_whose_writer_is_gone_are_removed(tmp_path):
    parts = {
        "mine, dead": f"0.safetensors.{HOST}.{NOBODY}.part",
        "mine, alive": f"1.safetensors.{HOST}.{os.getppid()}.part",
        "another machine's": f"2.safetensors.elsewhere.{NOBODY}.part",
        "another machine's, old": f"3.safetensors.elsewhere.{NOBODY}.part",
        "somebody's own": "film.part",
    }
    for name in parts.values():
        (tmp_path / name).write_bytes(b"x")
    old = (tmp_path / parts["another machine's, old"]).stat().st_mtime - 2 * ABANDONED_AFTER
    os.utime(tmp_path / parts["another machine's, old"], (old, old))
    assert not holds_anything(tmp_path)
    remove_parts(tmp_path)
    kept = {name for name, part in parts.items() if (tmp_path / part).exists()}
    assert kept == {"mine, alive", "another machine's", "somebody's own"}
