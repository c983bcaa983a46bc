"""Pre-training on a remote store: through a bounded cache, to the losses of the local store."""

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastmae.cli import run
from fastmae.runs.folder import read_metrics


@pytest.fixture
def server(small_store):
    """Serves `small_store` over HTTP: its URL, and the list of the paths that are requested."""
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(small_store.parent)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/{small_store.name}", requested
    httpd.shutdown()
    httpd.server_close()


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
    url, requested = server
    _, local, _ = pretrain(small_store, tmp_path / "local")
    code, remote, err = pretrain(url, tmp_path / "remote", "--cache", str(tmp_path / "cache"))
    assert code == 0, err
    assert remote == local
    shards = [path for path in requested if "/shards/" in path]
    assert len(shards) == len(set(shards)) == 4  # each shard is fetched once, although two workers read it
    by_file_url = pretrain(f"file://{small_store}", tmp_path / "file", "--cache", str(tmp_path / "cache2"))
    assert by_file_url[1] == local


def test_a_cache_smaller_than_the_store_stays_within_its_size_and_keeps_the_order_of_the_window(
    server, small_store, pretrain, tmp_path
):
    url, _ = server
    shards = sorted((path.stat().st_size for path in small_store.glob("shards/*")), reverse=True)
    other_files = sum(path.stat().st_size for path in small_store.rglob("*") if path.is_file()) - sum(shards)
    gigabytes = (
        2 * other_files + 3.2 * shards[0]
    ) / 1e9  # store.json and the like are cached twice, as the store pins them
    cache = tmp_path / "cache"
    options = ["--cache", str(cache), "--cache-size", str(gigabytes), "--shuffle-window", "1"]
    code, remote, err = pretrain(url, tmp_path / "remote", *options)
    assert code == 0, err
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= gigabytes * 1e9
    assert pretrain(small_store, tmp_path / "local", "--shuffle-window", "1")[1] == remote
    assert recorded_window(tmp_path / "remote") == 1


def test_a_truncated_shard_in_the_cache_is_fetched_again(server, pretrain, tmp_path):
    url, requested = server
    _, first, _ = pretrain(url, tmp_path / "a", "--cache", str(tmp_path / "cache"))
    for shard in (tmp_path / "cache").rglob("shards/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:3000])
    requested.clear()
    code, second, err = pretrain(url, tmp_path / "b", "--cache", str(tmp_path / "cache"))
    assert (code, second) == (0, first), err
    assert len({path for path in requested if "/shards/" in path}) == 4


def test_a_damaged_record_or_index_in_the_cache_is_fetched_again(server, flip_in_record, pretrain, tmp_path):
    url, _ = server
    cache = ["--cache", str(tmp_path / "cache")]
    _, first, _ = pretrain(url, tmp_path / "a", *cache)
    (cached_store,) = (path.parent for path in (tmp_path / "cache").rglob("shards"))
    flip_in_record(cached_store, 1, 2)
    index = cached_store / "index.parquet"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    code, second, err = pretrain(url, tmp_path / "b", *cache)
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
    url, _ = server
    store_bytes = sum(path.stat().st_size for path in small_store.rglob("*") if path.is_file())
    cache = ["--cache", str(tmp_path / "cache")]
    assert pretrain(url, tmp_path / "run", *cache, "--cache-size", str(1.05 * store_bytes / 1e9))[0] == 0
    assert recorded_window(tmp_path / "run") == 1
    code, _, err = pretrain(url, tmp_path / "run", *cache)  # the whole store would fit into this cache
    assert code == 0, err
    assert recorded_window(tmp_path / "run") == 1


def test_a_url_without_a_store_is_named_in_one_line(server, pretrain, tmp_path):
    url, _ = server
    code, _, err = pretrain(f"{url}-none", tmp_path / "run", "--cache", str(tmp_path / "cache"))
    assert code == 2
    (line,) = err.splitlines()
    assert f"{url}-none" in line
