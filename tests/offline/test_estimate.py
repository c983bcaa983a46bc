"""What a store will take: `--dry-run`, and a disk that is too small."""

import shutil
import subprocess

import pytest


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


def test_a_dry_run_estimates_size_and_time_and_writes_nothing(photos, vit_store, tokenize, contents, tmp_path):
    code, estimate, err = tokenize(photos / "train", tmp_path / "s", "--dry-run")
    assert code == 0
    assert not (tmp_path / "s").exists()
    assert estimate["bytes"] == pytest.approx(sum(map(len, contents(vit_store).values())), rel=0.1)
    assert estimate["images"] == 30
    assert estimate["seconds"] > 0
    assert "nothing was written" in err
    smaller = tokenize(photos / "train", tmp_path / "s", "--dry-run", "--codec", "pq16", "--pixels", "jpeg")[1]
    assert smaller["bytes_per_image"] < estimate["bytes_per_image"] / 4


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(photos, tokenize, small_disk):
    code, _, err = tokenize(photos / "train", small_disk / "s")
    assert code == 2
    assert "0.00166 GB" in err  # what the 30 images need
    assert not (small_disk / "s").exists()


def test_a_store_begun_on_a_full_disk_is_finished_on_another(
    photos, vit_store, tokenize, contents, small_disk, tmp_path
):
    store = small_disk / "s"
    for name in ("store.json", "lists/0.list", "shards/00000.safetensors", "shards/00001.safetensors"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(vit_store / name, store / name)
    code, _, err = tokenize(photos / "train", store)
    assert code == 2
    assert "free" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(store.rglob("*.part"))
    shutil.copytree(store, tmp_path / "s")
    assert tokenize(photos / "train", tmp_path / "s")[0] == 0
    assert contents(tmp_path / "s") == contents(vit_store)
