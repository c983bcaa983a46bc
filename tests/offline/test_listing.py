"""Which images enter a store: from any kind of source, and with `--add` only those that it does not hold yet."""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch


def test_a_list_and_tar_shards_give_the_same_tokens_as_the_folder(
    photos, vit_store, tokenize, keys_and_tokens, tmp_path
):
    folder = photos / "train"
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (tmp_path / "list.csv").write_text("label,path\n" + "".join(f"x,{folder / path}\n" for path in reversed(paths)))
    (tmp_path / "tars").mkdir()
    for number, members in enumerate((paths[1::2], paths[::2])):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            for path in members:
                tar.add(folder / path, path)
    assert tokenize(tmp_path / "list.csv", tmp_path / "list.tokens")[0] == 0
    assert tokenize(tmp_path / "tars", tmp_path / "tar.tokens")[0] == 0
    of_list, of_tars = keys_and_tokens(tmp_path / "list.tokens"), keys_and_tokens(tmp_path / "tar.tokens")
    from_folder = keys_and_tokens(vit_store)
    from_list = {str(Path(key).relative_to(folder)): tokens for key, tokens in of_list.items()}
    from_tars = {key.split(".tar/", 1)[1]: tokens for key, tokens in of_tars.items()}
    assert from_folder.keys() == from_list.keys() == from_tars.keys()
    for key, tokens in from_folder.items():  # batches hold other images, so sums are rounded differently
        torch.testing.assert_close(from_list[key], tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(from_tars[key], tokens, atol=1e-4, rtol=1e-4)


def test_add_takes_in_new_images_and_leaves_the_old_shards_as_they_were(
    photos, vit_store, tokenize, contents, keys_and_tokens, tmp_path
):
    def shards_of(store):
        return {name: data for name, data in contents(store).items() if "shards" in name}

    images, store = tmp_path / "images", tmp_path / "s.tokens"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    assert shards_of(store) == shards_of(vit_store)
    finished = contents(store)
    assert tokenize(images, store, "--add")[1]["images"] == 30  # nothing new
    assert contents(store) == finished

    shutil.copytree(photos / "val" / "china", images / "aaa")
    (images / "aaa" / "broken.jpg").write_bytes(b"no")
    code, _, err = tokenize(images, store)
    assert code == 2
    assert "--add" in err
    code, summary, _ = tokenize(images, store, "--add")
    assert (code, summary["images"], summary["skipped"]) == (0, 35, 1)
    assert shards_of(store).items() >= {name: data for name, data in finished.items() if "shards" in name}.items()
    decodable = {str(path.relative_to(images)) for path in images.rglob("*.*") if "broken" not in path.name}
    assert set(keys_and_tokens(store)) == decodable

    code, summary, _ = tokenize(photos / "val", store, "--add")  # another folder: an image with a known key is known
    assert (code, summary["images"]) == (0, 45)


def test_an_interrupted_add_goes_on_with_and_without_the_flag(photos, tokenize, contents, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s.tokens"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    shutil.copytree(photos / "val", images / "more")
    assert tokenize(images, store, "--add")[0] == 0
    finished = contents(store)
    for name in ("manifest.json", "index.parquet", "shards/00005.safetensors"):  # as a kill leaves them
        (store / name).unlink()
    assert tokenize(images, store, "--add")[0] == 0
    assert contents(store) == finished
    for name in ("manifest.json", "shards/00000.safetensors"):
        (store / name).unlink()
    assert tokenize(images, store)[0] == 0
    assert contents(store) == finished


def test_an_add_killed_before_store_json_was_written_goes_on(photos, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    shutil.copytree(photos / "val", images / "more")
    for name in ("manifest.json", "index.parquet"):  # the add has removed these, and store.json lists no new images yet
        (store / name).unlink()
    code, summary, _ = tokenize(images, store, "--add")
    assert (code, summary["images"]) == (0, 40)


def test_an_add_to_several_sizes_killed_between_two_of_them_goes_on(photos, tokenize, verify, contents, tmp_path):
    images, store, sizes = tmp_path / "images", tmp_path / "s", ["--middle-size", "64,96"]
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store, *sizes)[0] == 0
    shutil.copytree(store / "96", tmp_path / "before")
    shutil.copytree(photos / "val", images / "more")
    assert tokenize(images, store, *sizes, "--add")[0] == 0
    finished = contents(store)
    shutil.rmtree(store / "96")
    shutil.copytree(tmp_path / "before", store / "96")
    assert verify(store)[0] == 1
    assert tokenize(images, store, *sizes, "--add")[0] == 0
    assert contents(store) == finished


def test_add_needs_a_store(photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "train", tmp_path / "s", "--add")
    assert code == 2
    assert "--add" in err


def test_add_needs_nothing_of_the_images_that_are_in_the_store(photos, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    images.rename(tmp_path / "gone")
    code, summary, err = tokenize(photos / "val", store, "--add")
    assert (code, summary["images"]) == (0, 40), err
    assert "10 new images; 0 are in the store already" in err


@pytest.mark.parametrize("name", ["codebooks.safetensors", "lists/0.list", "index.parquet", "manifest.json"])
def test_add_refuses_a_damaged_store(name, photos, small_store, tokenize, contents, flip_bit, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    flip_bit(store / name, -9)
    damaged = contents(store)
    code, _, err = tokenize(photos / "val", store, "--add", "--codec", "pq16", "--pixels", "jpeg")
    assert code == 2
    assert name in err
    assert contents(store) == damaged


def test_new_images_in_the_folder_are_refused_with_a_hint_at_add(photos, vit_store, tokenize, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(photos / "train", images)
    shutil.copytree(photos / "val", images / "more")
    shutil.copytree(vit_store, tmp_path / "s")
    code, _, err = tokenize(images, tmp_path / "s")
    assert code == 2
    assert "--add" in err


def test_a_damaged_list_of_an_unfinished_store_is_written_again(
    photos, vit_store, tokenize, contents, flip_bit, tmp_path
):
    store = tmp_path / "s"
    shutil.copytree(vit_store, store)
    for name in ("manifest.json", "index.parquet", "shards/00001.safetensors"):
        (store / name).unlink()
    flip_bit(store / "lists" / "0.list", -9)
    assert tokenize(photos / "train", store)[0] == 0
    assert contents(store) == contents(vit_store)


def test_images_are_found_in_an_archive_that_was_packed_anew(
    photos, tokenize, verify, keys_and_tokens, flip_bit, tmp_path
):
    paths = sorted((photos / "train" / "china").iterdir())[:3]
    (tmp_path / "tars").mkdir()

    def pack(in_order):
        with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
            for path in in_order:
                tar.add(path, path.name)

    def assert_same(store, expected):
        tokens = keys_and_tokens(store)
        assert tokens.keys() == expected.keys()
        assert all(torch.equal(tokens[key], expected[key]) for key in expected)

    pack(paths)
    for store in ("whole", "resumed"):
        assert tokenize(tmp_path / "tars", tmp_path / store, "--shard-size", "1")[0] == 0
    expected = keys_and_tokens(tmp_path / "whole")
    for name in ("manifest.json", "shards/00001.safetensors", "shards/00002.safetensors"):
        (tmp_path / "resumed" / name).unlink()
    pack(reversed(paths))
    assert tokenize(tmp_path / "tars", tmp_path / "resumed", "--shard-size", "1")[0] == 0
    assert_same(tmp_path / "resumed", expected)
    flip_bit(tmp_path / "whole" / "shards" / "00002.safetensors", -9)
    assert verify(tmp_path / "whole", "--repair")[0] == 0
    assert_same(tmp_path / "whole", expected)
