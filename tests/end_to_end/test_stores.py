"""Pre-training on a store of several sizes, and on a disk that fills up."""

import shutil
import subprocess

import pytest

from fastmae.cli import run


def test_a_student_trains_on_a_store_of_several_sizes(photos, vit_teacher, tiny_student, tmp_path):
    store = tmp_path / "s"
    options = "--codec pq16 --middle-size 64,96 --shard-size 8 --workers 0".split()
    assert run(["tokenize", str(photos / "train"), str(store), *vit_teacher, *options]) == 0
    assert run(["pretrain", str(store), str(tmp_path / "run"), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_pre_training_in_one_line(vit_store, tiny_student, small_disk, error_line):
    run_folder = str(small_disk / "run")
    line = error_line(["pretrain", str(vit_store), run_folder, *tiny_student, "--epochs", "1", "--workers", "0"])
    assert "No space left on device" in line
    assert not list(small_disk.rglob("*.part"))
