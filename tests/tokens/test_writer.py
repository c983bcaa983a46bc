"""What the bytes of a store depend on, and which stores can be continued."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fastmae.cli import run

ARGS = [
    "--teacher",
    "timm/vit_tiny_patch16_224",
    "--middle-size",
    "96",
    "--shard-size",
    "8",
    "--codec",
    "fp32",
    "--pixels",
    "raw",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def build(photos, store, weights, *more):
    return run(["tokenize", str(photos / "train"), str(store), "--teacher-weights", str(weights), *ARGS, *more])


@pytest.mark.parametrize(
    "lost", [["shards/00002.safetensors"], ["shards/00000.safetensors", "index.parquet"], ["statistics.safetensors"]]
)
def test_an_unfinished_store_is_completed_with_the_same_bytes(
    lost, photos, vit_store, vit_weights, tmp_path, abandoned_part
):
    store = tmp_path / "s"
    shutil.copytree(vit_store, store)
    for name in lost:
        (store / name).unlink()
    (store / "shards" / abandoned_part("00002.safetensors")).write_bytes(b"half a shard")
    assert build(photos, store, vit_weights, "--workers", "0") == 0
    assert contents(store) == contents(vit_store)


def test_processes_that_share_a_store_write_the_bytes_of_one_process(
    photos, vit_store, vit_weights, tmp_path, capsys, monkeypatch
):
    store = tmp_path / "s"
    for rank in (2, 0):  # in any order
        assert (
            build(photos, store, vit_weights, "--workers", "0", "--rank", str(rank), "--world-size", "3", "--json") == 0
        )
        out = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert out["finished"] is False
        assert out["images"] == (8 if rank == 2 else 8 + 6)  # shards 2; 0 and 3
    assert not (store / "index.parquet").exists()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert build(photos, store, vit_weights, "--workers", "0") == 0
    assert contents(store) == contents(vit_store)


@pytest.mark.parametrize(
    "share",
    [
        ["--rank", "0"],
        ["--world-size", "2"],
        ["--rank", "2", "--world-size", "2"],
        ["--rank", "-1", "--world-size", "2"],
    ],
)
def test_an_impossible_rank_or_world_size_is_refused(share, photos, vit_weights, tmp_path, capsys):
    assert build(photos, tmp_path / "s", vit_weights, *share) == 2
    assert "--rank" in capsys.readouterr().err


def test_a_finished_store_is_left_alone(photos, vit_store, vit_weights, capsys):
    before = {path: path.stat().st_mtime_ns for path in vit_store.rglob("*")}
    assert build(photos, vit_store, vit_weights, "--json") == 0
    assert {path: path.stat().st_mtime_ns for path in vit_store.rglob("*")} == before
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["images"], summary["skipped"], summary["grid"], summary["token_dim"]) == (30, 0, 6, 192)
    card = "README.md"  # for people
    assert summary["bytes"] == sum(len(data) for name, data in contents(vit_store).items() if name != card)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--codec", "fp16"], "codec: fp32, not fp16"),
        (["--patch-size", "8"], "patch_size: 16, not 8"),
        (["--teacher-block", "3"], "block"),
    ],
)
def test_settings_that_differ_from_those_of_the_store_are_refused_by_name(
    more, named, photos, vit_store, vit_weights, capsys
):
    before = contents(vit_store)
    assert build(photos, vit_store, vit_weights, *more) == 2
    assert named in capsys.readouterr().err
    assert contents(vit_store) == before


def test_a_folder_that_is_not_a_store_is_left_alone(photos, vit_weights, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("mine")
    assert build(photos, tmp_path / "s", vit_weights) == 2
    assert "not a token store" in capsys.readouterr().err
    assert contents(tmp_path / "s") == {"thesis.tex": b"mine"}


def test_files_that_cannot_be_decoded_are_skipped_and_named_in_the_index(photos, vit_weights, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(photos / "val", images)
    (images / "broken.jpg").write_bytes(b"<html>")
    (images / "empty.png").write_bytes(b"")
    store = tmp_path / "s"
    args = ["tokenize", str(images), str(store), "--teacher-weights", str(vit_weights), *ARGS]
    assert run([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["skipped"] == 2
    assert "broken.jpg: not an image" in err
    table = pq.read_table(store / "index.parquet").to_pylist()
    assert [(row["path"], row["row"]) for row in table if row["status"] != "ok"] == [
        ("broken.jpg", -1),
        ("empty.png", -1),
    ]
    assert {row["label"] for row in table} == {"", "china", "flower"}
    assert run([*args[:2], str(tmp_path / "strict"), *args[3:], "--strict"]) == 2
    assert "broken.jpg: not an image" in capsys.readouterr().err


def test_a_folder_of_broken_files_alone_is_refused(vit_weights, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"<html>")
    assert (
        run(["tokenize", str(tmp_path / "images"), str(tmp_path / "s"), "--teacher-weights", str(vit_weights), *ARGS])
        == 2
    )
    assert "not one image could be decoded" in capsys.readouterr().err


@pytest.mark.promise("machine")
@pytest.mark.slow
def test_after_a_full_disk_the_same_command_completes_the_store(
    photos, vit_store, vit_weights, tmp_path, fastmae_command
):
    import resource
    import subprocess

    def limit():  # every write beyond 300 kB fails; a shard has 440 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    args = ["tokenize", str(photos / "train"), str(tmp_path / "s"), "--teacher-weights", str(vit_weights), *ARGS]
    done = subprocess.run([*fastmae_command, *args], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "00000.safetensors: File too large; free some space" in last
    assert "Traceback" not in done.stderr
    assert sorted(contents(tmp_path / "s")) == ["lists/0.list", "store.json"]
    assert build(photos, tmp_path / "s", vit_weights) == 0
    assert contents(tmp_path / "s") == contents(vit_store)


def test_a_folder_that_holds_only_what_a_kill_left_can_be_used(
    photos, vit_store, vit_weights, tmp_path, abandoned_part
):
    store = tmp_path / "s"
    store.mkdir()
    (store / abandoned_part("store.json")).write_text("{")
    assert build(photos, store, vit_weights) == 0
    assert contents(store) == contents(vit_store)
