"""Building a store: processes and sizes that share codebooks, odd names, and calls that are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmae.runtime.ownership import owned


@pytest.mark.parametrize("codec", ["int8", "pq16"])
def test_two_processes_build_the_same_store_as_one(codec, photos, tokenize, contents, tmp_path):
    assert tokenize(photos / "train", tmp_path / "one", "--codec", codec)[0] == 0
    for rank in ("1", "0"):
        share = ["--rank", rank, "--world-size", "2"]
        assert tokenize(photos / "train", tmp_path / "two", "--codec", codec, *share)[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_sizes_of_a_store_share_their_codebooks(photos, tokenize, verify, tmp_path):
    store = tmp_path / "s"
    assert tokenize(photos / "train", store, "--codec", "pq16", "--middle-size", "64,96")[0] == 0
    codebooks = [(store / size / "codebooks.safetensors").read_bytes() for size in ("64", "96")]
    assert codebooks[0] == codebooks[1]
    assert verify(store)[0] == 0


def test_lost_codebooks_come_back_from_their_copy_and_are_never_learnt_anew_for_old_shards(
    photos, small_store, tokenize, contents, tmp_path
):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    for name in ("codebooks.safetensors", "shards/00003.safetensors"):
        (store / name).unlink()
    options = ["--codec", "pq16", "--pixels", "jpeg", "--codec-images", "8"]
    assert tokenize(photos / "train", store, *options)[0] == 0
    assert contents(store).keys() == contents(small_store).keys()
    assert contents(store)["codebooks.safetensors"] == contents(small_store)["codebooks.safetensors"]
    for name in ("codebooks.safetensors", "codebooks.copy.safetensors", "shards/00003.safetensors"):
        (store / name).unlink()
    code, _, err = tokenize(photos / "train", store, *options)
    assert code == 2
    assert "codebooks.safetensors" in err


@pytest.mark.slow
def test_names_that_are_not_utf8_and_a_single_image_make_a_store(
    photos, vit_weights, fastmae_command, flip_bit, tmp_path
):
    images, store = Path(str(tmp_path) + "/im\udce9ges"), tmp_path / "störe"
    images.mkdir()
    shutil.copyfile(photos / "train" / "china" / "00.jpg", images / "\udcff.jpg")

    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", vit_weights]
    options = [*teacher, "--middle-size", "96", "--workers", "0", "--codec", "fp32", "--pixels", "raw"]

    def call(*args):
        """Run commands in a process whose streams are the system's: their exit codes, results and messages."""
        commands = [[*map(str, words), "--json"] for words in args]
        script = "import sys\nfrom fastmae.cli import run\nfor end in map(run, eval(sys.argv[1])): print(f'code {end}')"
        command = [fastmae_command[0], "-c", script, ascii(commands)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        codes = [int(line.removeprefix("code ")) for line in lines if line.startswith("code ")]
        return codes, [json.loads(line) for line in lines if line.startswith("{")], done.stderr

    tokenize = ["tokenize", images, store, *options]
    codes, (estimate, _), err = call([*tokenize, "--dry-run"], tokenize)
    assert codes == [0, 0], err
    assert estimate["images"] == 1
    assert estimate["images_per_second"] > 0
    flip_bit(store / "shards" / "00000.safetensors", -9)
    verify = ["verify", store, "--repair", "--workers", "0"]
    codes, (repaired,), err = call(verify, ["tokenize", images, str(tmp_path) + "/st\udcefre", *options])
    assert codes == [0, 2], err
    assert repaired == {"ok": True, "damaged": []}
    assert "UTF-8" in err


def test_a_refused_call_leaves_nothing_in_the_way_of_the_right_one(photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "val", tmp_path / "s", "--codec", "pq999")
    assert code == 2
    assert "--codec pq999" in err
    assert not (tmp_path / "s").exists()
    assert tokenize(photos / "val", tmp_path / "s")[0] == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--middle-size", "100"], "--middle-size 100"),
        (["--middle-size", "96,big"], "--middle-size big"),
        (["--channels", "5"], "--channels 5"),
        (["--channels", "5", "--teacher-channels", "0,1,5"], "--teacher-channels 5"),
        (["--channels", "5", "--teacher-channels", "0,1,4", "--pixels", "jpeg"], "--pixels raw"),
        (["--rank", "1"], "--world-size"),
        (["--rank", "2", "--world-size", "2"], "--rank 2"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, named, photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "val", tmp_path / "s", *options)
    assert code == 2
    assert named in err
    assert not (tmp_path / "s").exists()


@pytest.mark.promise("owner")
def test_a_second_process_with_the_same_share_is_refused_and_one_with_another_share_is_not(
    photos, tokenize, contents, tmp_path
):
    store = tmp_path / "s"
    with owned(store, "tokenize", "0-of-2"):
        code, _, err = tokenize(photos / "train", store, "--rank", "0", "--world-size", "2")
        assert code == 2
        assert f"fastmae tokenize: {store}: in use by process " in err
        assert list(contents(store)) == [".owner.0-of-2.lock"]
        assert tokenize(photos / "train", store, "--rank", "1", "--world-size", "2")[0] == 0


def test_without_faiss_a_store_that_needs_it_is_not_begun(photos, tokenize, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # which Python takes for a module that is not there
    code, _, err = tokenize(photos / "train", tmp_path / "s", "--codec", "pq16")
    assert code == 2
    assert "pip install 'fastmae[pq]'" in err
    assert not (tmp_path / "s" / "store.json").exists()
