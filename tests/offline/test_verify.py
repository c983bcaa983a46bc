"""`fastmae verify`: any flipped bit is found and named, and a repair ends in the bytes that were there."""

import json
import random
import shutil

import pytest

from fastmae.cli import run
from fastmae.tokens.format import shard_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def verify(store, capsys, *more):
    capsys.readouterr()
    code = run(["verify", str(store), "--json", "--workers", "0", *more])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


def flip_bit(file, seed):
    random.seed(seed)
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


def test_a_sound_store_is_sound(small_store, capsys):
    code, result, _ = verify(small_store, capsys)
    assert (code, result) == (0, {"ok": True, "damaged": []})


def test_a_flipped_bit_in_any_file_is_found_named_and_repaired(small_store, tmp_path, capsys):
    names = list(contents(small_store))
    assert {
        "store.json",
        "manifest.json",
        "index.parquet",
        "statistics.safetensors",
        "lists/0.list",
        "codebooks.safetensors",
    } <= set(names)
    for number, name in enumerate(names * 2):
        store = tmp_path / str(number)
        shutil.copytree(small_store, store)
        flip_bit(store / name, number)
        code, result, err = verify(store, capsys)
        assert code == 1
        assert [damage["file"] for damage in result["damaged"]] == [str(store / name)], name
        assert name in err
        code, result, _ = verify(store, capsys, "--repair")
        assert (code, result["ok"]) == (0, True)
        assert contents(store) == contents(small_store), name
        shutil.rmtree(store)


def test_damage_names_the_shard_and_its_images(small_store, flip_in_record, tmp_path, capsys):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    flip_in_record(store, 1, 3)
    flip_in_record(store, 1, 5)
    code, result, err = verify(store, capsys)
    assert code == 1
    assert result["damaged"][0]["file"].endswith("shards/00001.safetensors")
    assert len(result["damaged"][0]["images"]) == 2
    assert all(image in err for image in result["damaged"][0]["images"])


@pytest.mark.parametrize(
    "lost", [["shards/00002.safetensors"], ["manifest.json"], ["store.json", "index.parquet", "lists/0.list"]]
)
def test_lost_files_are_made_again(lost, small_store, tmp_path, capsys):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    for name in lost:
        (store / name).unlink()
    code, result, _ = verify(store, capsys)
    assert (code, sorted(damage["file"] for damage in result["damaged"])) == (
        1,
        sorted(str(store / name) for name in lost),
    )
    assert verify(store, capsys, "--repair")[0] == 0
    assert contents(store) == contents(small_store)


def test_what_can_not_be_made_again_is_one_line(small_store, tmp_path, capsys):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    for name in ("codebooks.safetensors", "codebooks.copy.safetensors"):
        flip_bit(store / name, 0)
    assert run(["verify", str(store), "--repair"]) == 2
    assert "no token can be read without" in capsys.readouterr().err
    for name in ("store.json", "manifest.json"):
        (store / name).write_text("{")
    assert run(["verify", str(store), "--repair"]) == 2
    assert "tokenize again" in capsys.readouterr().err


def test_a_shard_that_was_renamed_is_found(small_store, tmp_path, capsys):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    shutil.copyfile(shard_path(store, 0), shard_path(store, 1))
    assert verify(store, capsys)[0] == 1


def test_a_folder_that_is_no_store_is_one_line(tmp_path, capsys):
    assert run(["verify", str(tmp_path)]) == 2
    assert "not a token store" in capsys.readouterr().err
