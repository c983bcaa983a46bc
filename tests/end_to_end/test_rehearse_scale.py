"""`tools/rehearse_scale.py` at a tiny size: its store is a real one, and it measures all that it lists."""

import importlib
from pathlib import Path

import pytest

from fastmae import TokenStore
from fastmae.cli import run

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("rehearse_scale")


def test_the_synthetic_store_is_intact_and_its_parts_are_timed(rehearsal, tmp_path):
    rows = rehearsal.build(tmp_path / "store", 2700, 256)
    assert [row.seconds > 0 for row in rows] == [True] * 3
    store = TokenStore(tmp_path / "store")
    assert (len(store), store.info.shards, store.skipped) == (2700, 11, 0)
    assert store.key(1300) == "n00000001/n00000001_0000001300.JPEG"
    assert run(["verify", str(tmp_path / "store")]) == 0
    assert rehearsal.opening(tmp_path / "store").seconds > 0
    assert rehearsal.shuffling(tmp_path / "store", 4).seconds > 0
    assert rehearsal.list_tar(tmp_path, 20).seconds > 0
    assert not (tmp_path / "members.tar").exists()


def test_a_training_run_is_watched_with_its_loading_processes(rehearsal, tmp_path):
    args = ["--folder", str(tmp_path / "new"), "--steps", "60", "--batch-size", "64", "--workers", "1"]
    options = rehearsal.parsed(args)
    rehearsal.build(options.folder / "store", 512, 256)
    row = rehearsal.pretraining(options.folder / "store", 512, options)
    assert row.main_mb > 50
    assert 1 < row.worker_mb < row.main_mb
    assert row.cpu_seconds > 0.5
    line = rehearsal.table([row]).splitlines()[-1]
    assert line.startswith("| `pretrain` on 512 images, 60 steps of 64 | ")
    assert line.count("|") == 6


def test_a_command_that_fails_ends_the_rehearsal_with_its_message_and_a_folder_must_be_new(rehearsal, tmp_path):
    with pytest.raises(SystemExit, match="no-such-command"):
        rehearsal.command("nothing", "no-such-command")
    with pytest.raises(SystemExit):
        rehearsal.parsed(["--folder", str(tmp_path)])
