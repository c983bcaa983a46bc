"""`fastmae verify --repair`: it ends in the bytes that were there, or it refuses and loses nothing."""

import errno
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.tokens.format import checksum, shard_path
from fastmae.tokens.manifest import Manifest, read_header
from fastmae.tokens.writer import StoreWriter
from tokens.edited_store import EditedShard

CODEBOOKS = ("codebooks.safetensors", "codebooks.copy.safetensors")


@pytest.fixture
def small_copy(small_store, tmp_path):
    """A copy of `small_store` that a test may damage."""
    shutil.copytree(small_store, tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def images_and_store(photos, tokenize, tmp_path):
    """A folder of images that a test may change, and a store of them in 4 shards."""
    shutil.copytree(photos / "train", tmp_path / "images")
    assert tokenize(tmp_path / "images", tmp_path / "s")[0] == 0
    return tmp_path / "images", tmp_path / "s"


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_found_named_and_repaired(small_store, verify, contents, flip_bit, tmp_path):
    files = contents(small_store)
    assert {"store.json", "manifest.json", "index.parquet", "statistics.safetensors", "lists/0.list"} <= files.keys()
    assert set(CODEBOOKS) <= files.keys()
    checked = [name for name in files if name != "README.md"]  # the card is for people, who may edit it
    for seed, name in enumerate([*checked, *checked]):
        store = tmp_path / str(seed)
        shutil.copytree(small_store, store)
        flip_bit(store / name, seed=seed)
        code, result, err = verify(store)
        assert code == 1
        assert [damage["file"] for damage in result["damaged"]] == [str(store / name)], name
        assert name in err
        code, result, _ = verify(store, "--repair")
        assert (code, result["ok"]) == (0, True)
        assert contents(store) == files, name
        shutil.rmtree(store)


@pytest.mark.parametrize(
    "lost", [["shards/00002.safetensors"], ["manifest.json"], ["store.json", "index.parquet", "lists/0.list"]]
)
def test_lost_files_are_named_and_made_again(lost, small_store, small_copy, verify, contents):
    for name in lost:
        (small_copy / name).unlink()
    code, result, _ = verify(small_copy)
    named = sorted(damage["file"] for damage in result["damaged"])
    assert (code, named) == (1, sorted(str(small_copy / name) for name in lost))
    assert verify(small_copy, "--repair")[0] == 0
    assert contents(small_copy) == contents(small_store)


@pytest.mark.promise("stores")
def test_records_that_cant_be_used_are_named_and_made_again_though_their_checksums_are_right(
    small_store, small_copy, verify, contents
):
    shard = EditedShard(shard_path(small_copy, 1))
    shard.tensors["token_means"][3, 5] = float("nan")
    shard.sign()
    manifest = Manifest.read(small_copy / "manifest.json")
    header = checksum(read_header(shard.file))
    manifest.shards[1] = (shard.file.stat().st_size, header)
    manifest.write(small_copy)
    code, result, err = verify(small_copy)
    assert code == 1
    assert [len(damage["images"]) for damage in result["damaged"]] == [1]
    assert "the token_means of its image 3 hold NaN" in err.splitlines()[-1]
    assert verify(small_copy, "--repair")[0] == 0
    assert contents(small_copy) == contents(small_store)


def test_a_repair_finishes_an_unfinished_store(vit_store, verify, contents, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(vit_store, store)
    for name in ("manifest.json", "index.parquet", "statistics.safetensors", "shards/00001.safetensors"):
        (store / name).unlink()
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == contents(vit_store)


def test_shards_and_lists_of_every_part_are_made_again(photos, images_and_store, tokenize, verify, contents):
    images, store = images_and_store
    shutil.copytree(photos / "val" / "china", images / "more")
    (images / "more" / "broken.jpg").write_bytes(b"no")
    assert tokenize(images, store, "--add")[0] == 0
    assert tokenize(photos / "val", store, "--add")[0] == 0
    finished = contents(store)
    for shard in (2, 4, 6):  # one of each part
        shard_path(store, shard).unlink()
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == finished
    (store / "lists" / "1.list").unlink()
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == finished


def test_files_that_follow_from_the_shards_are_made_again_without_images(images_and_store, verify, contents, flip_bit):
    images, store = images_and_store
    finished = contents(store)
    shutil.rmtree(images)
    flip_bit(store / "statistics.safetensors")
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == finished


def test_the_list_of_sizes_is_verified_and_repaired(photos, tokenize, verify, contents, flip_bit, tmp_path):
    store = tmp_path / "s"
    assert tokenize(photos / "val", store, "--middle-size", "64,96")[0] == 0
    finished, scales = contents(store), store / "scales.json"
    for damage in (lambda: flip_bit(scales, 14), scales.unlink):
        damage()
        code, result, err = verify(store)
        assert (code, [entry["file"] for entry in result["damaged"]]) == (1, [str(scales)])
        assert "scales.json" in err
        assert verify(store, "--repair")[0] == 0
        assert contents(store) == finished
    (store / "64" / "store.json").unlink()  # the size must not drop out of the list for that
    assert verify(store)[0] == 1
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == finished
    scales.write_text('{"sizes": []}')
    assert run(["inspect", str(store)]) == 2


def test_a_store_without_any_sound_codebooks_or_description_is_refused(small_copy, verify, flip_bit):
    for name in CODEBOOKS:
        flip_bit(small_copy / name)
    code, _, err = verify(small_copy, "--repair")
    assert code == 2
    assert CODEBOOKS[0] in err
    for name in ("store.json", "manifest.json"):
        (small_copy / name).write_text("{")
    code, _, err = verify(small_copy, "--repair")
    assert code == 2
    assert "store.json" in err


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebooks_that_differ_from_their_copy_are_refused_without_a_manifest(name, small_copy, verify, flip_bit):
    """Nothing tells then which of the two is the damaged one."""
    flip_bit(small_copy / name, -9)
    (small_copy / "manifest.json").unlink()
    assert verify(small_copy, "--repair")[0] == 2


@pytest.mark.parametrize("manifest", ["sound", "damaged"])
def test_a_repair_with_changed_images_is_refused_and_touches_no_shard(
    manifest, photos, images_and_store, verify, contents, flip_in_record, flip_bit
):
    images, store = images_and_store
    finished = contents(store)
    keys = TokenStore(store).table()["path"].to_pylist()
    flip_in_record(store, 1, 2)
    if manifest == "damaged":
        flip_bit(store / "manifest.json", -9)
    damaged = contents(store)
    shutil.copyfile(images / keys[0], images / keys[12])  # the damaged record is image 10 of the same shard
    code, _, err = verify(store, "--repair")
    assert code == 2
    assert keys[12] in err
    assert contents(store) == damaged
    shutil.copyfile(photos / "train" / keys[12], images / keys[12])
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == finished


def test_a_repair_with_other_weights_is_refused_and_touches_no_shard(
    photos, vit_weights, tokenize, verify, contents, flip_in_record, tmp_path
):
    weights, store = tmp_path / "weights.safetensors", tmp_path / "s"
    shutil.copyfile(vit_weights, weights)
    assert tokenize(photos / "train", store, "--teacher-weights", str(weights))[0] == 0
    finished = contents(store)
    flip_in_record(store, 1, 2)
    damaged = contents(store)
    changed = load_file(weights)
    changed["norm.bias"] += 1
    save_file(changed, weights)
    code, _, err = verify(store, "--repair")
    assert code == 2
    assert "timm/vit_tiny_patch16_224" in err
    assert contents(store) == damaged
    shutil.copyfile(vit_weights, weights)
    assert verify(store, "--repair")[0] == 0
    assert contents(store) == finished


def test_a_repair_that_stops_halfway_keeps_the_damaged_shard(small_copy, verify, contents, flip_in_record, monkeypatch):
    flip_in_record(small_copy, 1, 2)
    damaged = contents(small_copy)

    def full_disk(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StoreWriter, "write_shard", full_disk)
    assert verify(small_copy, "--repair")[0] == 2
    assert contents(small_copy) == damaged
