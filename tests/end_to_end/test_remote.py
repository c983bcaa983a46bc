"""Pre-training on a remote store: through a bounded cache, to the losses of the local store."""

import contextlib
import json
import shutil
import threading

import pytest

from fastmae.cli import run
from fastmae.runs.folder import read_metrics
from fastmae.tokens import transfer
from fastmae.tokens.format import shard_path
from lying_server import Lies, LyingServer

SHARD = "shards/00001.safetensors"


@pytest.fixture
def server(small_store):
    """Serves `small_store` over HTTP."""
    with LyingServer(small_store) as server:
        yield server


@pytest.fixture
def pretrain(tiny_student, capsys):
    """(store, folder, options) -> exit code, losses and standard error of a run of three epochs."""

    def call(store, folder, *options):
        args = ["pretrain", str(store), str(folder), *tiny_student, "--epochs", "3", "--workers", "2", *options]
        code = run(args)
        losses = [entry["loss"] for entry in read_metrics(folder)] if code == 0 else []
        return code, losses, capsys.readouterr().err

    return call


def recorded_window(run_folder):
    return json.loads((run_folder / "run.json").read_text())["options"]["shuffle_window"]


def test_a_store_behind_a_url_gives_the_losses_of_the_local_one(server, small_store, pretrain, tmp_path):
    _, local, _ = pretrain(small_store, tmp_path / "local")
    code, remote, err = pretrain(server.url, tmp_path / "remote", "--cache", str(tmp_path / "cache"))
    assert code == 0, err
    assert remote == local
    fetched = [count for name, count in server.requests.items() if name.startswith("shards/")]
    assert fetched == [1] * 4  # each shard is fetched once, although two workers read it
    by_file_url = pretrain(f"file://{small_store}", tmp_path / "file", "--cache", str(tmp_path / "cache2"))
    assert by_file_url[1] == local


def test_a_cache_smaller_than_the_store_stays_within_its_size_and_keeps_the_order_of_the_window(
    server, small_store, pretrain, tmp_path
):
    shards = sorted((path.stat().st_size for path in small_store.glob("shards/*")), reverse=True)
    other_files = sum(path.stat().st_size for path in small_store.rglob("*") if path.is_file()) - sum(shards)
    gigabytes = (
        2 * other_files + 3.2 * shards[0]
    ) / 1e9  # store.json and the like are cached twice, as the store pins them
    options = ["--cache", str(tmp_path / "cache"), "--cache-size", str(gigabytes), "--shuffle-window", "1"]
    with most_bytes(tmp_path / "cache") as most:
        code, remote, err = pretrain(server.url, tmp_path / "remote", *options)
    assert code == 0, err
    assert shards[0] < most[0] <= gigabytes * 1e9
    assert pretrain(small_store, tmp_path / "local", "--shuffle-window", "1")[1] == remote
    assert recorded_window(tmp_path / "remote") == 1


def test_a_truncated_shard_in_the_cache_is_fetched_again(server, pretrain, tmp_path):
    _, first, _ = pretrain(server.url, tmp_path / "a", "--cache", str(tmp_path / "cache"))
    for shard in (tmp_path / "cache").rglob("shards/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:3000])
    server.requests.clear()
    code, second, err = pretrain(server.url, tmp_path / "b", "--cache", str(tmp_path / "cache"))
    assert (code, second) == (0, first), err
    assert len([name for name in server.requests if name.startswith("shards/")]) == 4


def test_a_damaged_record_or_index_in_the_cache_is_fetched_again(server, flip_in_record, pretrain, tmp_path):
    cache = ["--cache", str(tmp_path / "cache")]
    _, first, _ = pretrain(server.url, tmp_path / "a", *cache)
    (cached_store,) = (path.parent for path in (tmp_path / "cache").rglob("shards"))
    flip_in_record(cached_store, 1, 2)
    index = cached_store / "index.parquet"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    code, second, err = pretrain(server.url, tmp_path / "b", *cache)
    assert (code, second) == (0, first), err


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["folder", "url"])
def test_a_missing_shard_stops_the_run_unless_damage_is_skipped(prefix, small_store, pretrain, tmp_path):
    store = shutil.copytree(small_store, tmp_path / "s")
    (store / "shards" / "00002.safetensors").unlink()
    cache = ["--cache", str(tmp_path / "cache")]
    code, _, err = pretrain(f"{prefix}{store}", tmp_path / "a", *cache)
    assert code == 2
    assert "00002.safetensors" in err
    assert "Traceback" not in err
    assert pretrain(f"{prefix}{store}", tmp_path / "b", *cache, "--on-damage", "skip")[0] == 0


def test_the_window_follows_from_the_cache_and_a_continued_run_keeps_it(server, small_store, pretrain, tmp_path):
    store_bytes = sum(path.stat().st_size for path in small_store.rglob("*") if path.is_file())
    cache = ["--cache", str(tmp_path / "cache")]
    assert pretrain(server.url, tmp_path / "run", *cache, "--cache-size", str(1.05 * store_bytes / 1e9))[0] == 0
    assert recorded_window(tmp_path / "run") == 1
    code, _, err = pretrain(server.url, tmp_path / "run", *cache)  # the whole store would fit into this cache
    assert code == 0, err
    assert recorded_window(tmp_path / "run") == 1


def test_a_url_without_a_store_is_named_in_one_line(server, pretrain, tmp_path):
    code, _, err = pretrain(f"{server.url}-none", tmp_path / "run", "--cache", str(tmp_path / "cache"))
    assert code == 2
    (line,) = err.splitlines()
    assert f"{server.url}-none" in line


@pytest.fixture
def pretrain_line(error_line, tiny_student, tmp_path):
    """(URL) -> the line with which `pretrain` refuses the store, without loading processes."""
    options = [*tiny_student, "--epochs", "1", "--workers", "0", "--cache", str(tmp_path / "cache")]
    return lambda url: error_line(["pretrain", url, str(tmp_path / "run"), *options])


LIES = {
    ("store.json", Lies.web_page): "the server answered with a web page, not the file; check the address",
    ("scales.json", Lies.web_page): "the server answered with a web page, not the file; check the address",
    ("store.json", Lies.petabyte): "has 1125899906842624 bytes, not at most the 4.194 MB that such a file may have; ",
    ("manifest.json", Lies.endless): "more bytes come, not at most the 268.4 MB that such a file may have; check that",
    ("index.parquet", Lies.endless): "more bytes come, not the ",
    (SHARD, Lies.drips): "can't be fetched (less than 10 kB came in 1 s, tried 1 times); check the address and the ",
}


@pytest.mark.promise("remote")
@pytest.mark.parametrize(("name", "lie"), LIES, ids=lambda part: getattr(part, "__name__", part))
def test_a_lie_of_a_server_ends_the_command_with_one_line_that_names_the_url(
    name, lie, server, pretrain_line, monkeypatch, tmp_path
):
    monkeypatch.setattr(transfer, "RETRY_AFTER", ())
    monkeypatch.setattr(transfer, "SLOW_AFTER", 1.0)
    server.lies[name] = lie
    with most_bytes(tmp_path / "cache") as most:
        assert f"{server.url}/{name}: {LIES[name, lie]}" in pretrain_line(server.url)
    assert most[0] < 2 * sum(path.stat().st_size for path in server.folder.rglob("*") if path.is_file())
    assert not list((tmp_path / "cache").rglob("*.part"))


@contextlib.contextmanager
def most_bytes(folder):
    """A list whose one entry is the most bytes that the files of a folder, locks aside, have had at any moment."""
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            total = 0
            for path in folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size if path.is_file() and path.suffix != ".lock" else 0
            most[0] = max(most[0], total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def cut_off(store, name):
    (store / name).write_bytes((store / name).read_bytes()[:-9])


def flip(store, name):
    data = bytearray((store / name).read_bytes())
    data[-40] ^= 1
    (store / name).write_bytes(data)


DAMAGE = {
    "scales.json": lambda store: (store / "scales.json").write_text("[]"),
    "store.json": lambda store: cut_off(store, "store.json"),
    "manifest.json": lambda store: flip(store, "manifest.json"),
    "index.parquet": lambda store: flip(store, "index.parquet"),
    "codebooks.safetensors": lambda store: flip(store, "codebooks.safetensors"),
    "statistics.safetensors": lambda store: flip(store, "statistics.safetensors"),
}


@pytest.mark.promise("remote")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_behind_a_url_is_named_with_a_way_out_that_a_url_has(name, small_store, pretrain_line, tmp_path):
    store = shutil.copytree(small_store, tmp_path / "s")
    DAMAGE[name](store)
    line = pretrain_line(f"file://{store}")
    assert line.startswith(f"fastmae pretrain: file://{store}/{name}: ")
    assert line.endswith("; copy the store there again, or run `fastmae verify` where it lies")
    assert str(tmp_path / "cache") not in line


@pytest.mark.promise("remote")
def test_a_damaged_image_behind_a_url_is_named_with_a_way_out_that_a_url_has(
    small_store, flip_in_record, pretrain_line, tmp_path
):
    store = shutil.copytree(small_store, tmp_path / "s")
    flip_in_record(store, 1, 2)
    line = pretrain_line(f"file://{store}")
    assert f"file://{store}/{SHARD}: the tokens of its image 2 are damaged; copy the store there again, or run" in line
    assert line.endswith("where it lies, or give --on-damage skip")
    assert "--repair" not in line


@pytest.mark.promise("remote")
def test_files_of_another_store_are_named_as_such(small_store, vit_store, pretrain_line, tmp_path):
    store = shutil.copytree(small_store, tmp_path / "s")
    shutil.copy(vit_store / "manifest.json", store)
    assert f"file://{store}/store.json: does not go with manifest.json (" in pretrain_line(f"file://{store}")
    shutil.copy(small_store / "manifest.json", store)
    shutil.copy(shard_path(vit_store, 1), shard_path(store, 1))
    line = pretrain_line(f"file://{store}")
    assert f"file://{store}/{SHARD}: more bytes come, not the {shard_path(small_store, 1).stat().st_size} of" in line
