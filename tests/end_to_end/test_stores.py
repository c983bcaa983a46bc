"""From images to pre-training: a store of several sizes, and a disk that fills up."""

import shutil
import subprocess

import pytest

from fastmae.cli import run


def test_a_store_of_several_sizes_trains(photos, vit_weights, tiny_student, tmp_path):
    store = tmp_path / "s"
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    options = ["--codec", "pq16", "--middle-size", "64,96", "--shard-size", "8", "--workers", "0"]
    assert run(["tokenize", str(photos / "train"), str(store), *teacher, *options]) == 0
    assert run(["pretrain", str(store), str(tmp_path / "run"), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_pretraining_on_a_full_disk_ends_in_one_line(vit_store, tiny_student, small_disk, capsys):
    run_folder = str(small_disk / "run")
    assert run(["pretrain", str(vit_store), run_folder, *tiny_student, "--epochs", "1", "--workers", "0"]) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(small_disk.rglob("*.part"))
