"""`fastmae verify` without a repair: any damage is found and named."""

import shutil

import pytest

from fastmae.runtime.ownership import owned
from fastmae.tokens.format import shard_path


def test_a_sound_store_is_sound(small_store, verify):
    code, result, _ = verify(small_store)
    assert (code, result) == (0, {"ok": True, "damaged": []})


def test_damage_names_the_shard_and_its_images(small_store, verify, flip_in_record, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    flip_in_record(store, 1, 3)
    flip_in_record(store, 1, 5)
    code, result, err = verify(store)
    assert code == 1
    assert result["damaged"][0]["file"].endswith("shards/00001.safetensors")
    assert len(result["damaged"][0]["images"]) == 2
    assert all(image in err for image in result["damaged"][0]["images"])


def test_a_shard_in_the_place_of_another_is_found(small_store, verify, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    shutil.copyfile(shard_path(store, 0), shard_path(store, 1))
    assert verify(store)[0] == 1


def test_an_unfinished_store_is_reported_as_unfinished_not_as_damaged_shards(vit_store, verify, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(vit_store, store)
    for name in ("manifest.json", "index.parquet", "statistics.safetensors"):
        (store / name).unlink()
    for shard in (1, 2):
        shard_path(store, shard).unlink()
    code, result, err = verify(store)
    assert (code, [damage["file"] for damage in result["damaged"]]) == (1, [str(store / "manifest.json")])
    assert "not finished (2 of its 4 shards are there)" in err


def test_a_folder_that_is_no_store_is_an_input_error(verify, tmp_path):
    code, _, err = verify(tmp_path)
    assert code == 2
    assert str(tmp_path) in err


@pytest.mark.parametrize("url", ["https://example.org/x.tokens", "file:///data/x.tokens"])
def test_inspect_reads_a_folder_and_refuses_a_url(url, error_line):
    assert f"{url}: a URL" in error_line(["inspect", url])


def test_a_store_behind_a_url_is_checked_as_in_its_folder(small_store, verify, tmp_path):
    url = f"file://{small_store}"
    assert verify(url)[:2] == (0, {"ok": True, "damaged": []})
    store = shutil.copytree(small_store, tmp_path / "s")
    shard_path(store, 2).write_bytes(shard_path(store, 2).read_bytes()[:-1] + b"x")
    code, result, err = verify(f"file://{store}")
    assert code == 1
    assert [damage["file"] for damage in result["damaged"]] == [f"file://{store}/shards/00002.safetensors"]
    assert "repair the store where it was made and upload it again" in err
    (store / "manifest.json").write_text("[]")
    code, result, _ = verify(f"file://{store}")
    assert (code, result["damaged"][0]["file"]) == (1, f"file://{store}/manifest.json")


@pytest.mark.promise("owner")
def test_a_store_that_is_being_written_is_checked_but_not_repaired(small_store, verify, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    with owned(store, "tokenize"):
        assert verify(store)[0] == 0
        code, _, err = verify(store, "--repair")
    assert code == 2
    assert f"fastmae verify: {store}: in use by process " in err
