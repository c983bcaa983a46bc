"""Training from a store that is somewhere else: through a bounded cache, to the same loss."""

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
    """Serves the small store's folder over HTTP; gives its address and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            """Nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(small_store.parent)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/{small_store.name}", asked
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def pretrain(tiny_student, capsys):
    def call(store, folder, *more):
        code = run(["pretrain", str(store), str(folder), *tiny_student, "--epochs", "3", "--workers", "2", *more])
        return code, [entry["loss"] for entry in read_metrics(folder)] if code == 0 else [], capsys.readouterr().err

    return call


def test_a_store_behind_a_url_trains_to_the_loss_of_the_local_one(server, small_store, pretrain, tmp_path):
    url, asked = server
    _, local, _ = pretrain(small_store, tmp_path / "local")
    code, remote, err = pretrain(url, tmp_path / "remote", "--cache", str(tmp_path / "cache"))
    assert code == 0, err
    assert remote == local
    fetched = [path for path in asked if "/shards/" in path]
    assert len(fetched) == len(set(fetched)) == 4  # each shard once, whatever the number of processes
    assert pretrain(f"file://{small_store}", tmp_path / "again", "--cache", str(tmp_path / "cache2"))[1] == local


def test_a_cache_smaller_than_the_store_is_bounded_and_gives_the_order_of_its_window(
    server, small_store, pretrain, tmp_path
):
    url, _ = server
    shards = sorted((path.stat().st_size for path in small_store.glob("shards/*")), reverse=True)
    small_files = sum(path.stat().st_size for path in small_store.rglob("*") if path.is_file()) - sum(shards)
    cache = tmp_path / "cache"
    gigabytes = (2 * small_files + 3.2 * shards[0]) / 1e9  # store.json and its like lie there as found and as pinned
    code, remote, err = pretrain(
        url, tmp_path / "r", "--cache", str(cache), "--cache-size", str(gigabytes), "--shuffle-window", "1"
    )
    assert code == 0, err
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= gigabytes * 1e9
    assert pretrain(small_store, tmp_path / "local", "--shuffle-window", "1")[1] == remote
    assert json.loads((tmp_path / "r" / "run.json").read_text())["options"]["shuffle_window"] == 1


def test_a_damaged_copy_in_the_cache_is_fetched_anew(server, pretrain, tmp_path):
    url, asked = server
    _, first, _ = pretrain(url, tmp_path / "a", "--cache", str(tmp_path / "cache"))
    for copy in (tmp_path / "cache").rglob("shards/*.safetensors"):
        copy.write_bytes(copy.read_bytes()[:3000])
    asked.clear()
    code, again, err = pretrain(url, tmp_path / "b", "--cache", str(tmp_path / "cache"))
    assert (code, again) == (0, first), err
    assert len({path for path in asked if "/shards/" in path}) == 4


def test_a_damaged_record_or_index_in_the_cache_is_fetched_anew(
    server, small_store, flip_in_record, pretrain, tmp_path
):
    url, _ = server
    cache = ["--cache", str(tmp_path / "cache")]
    _, first, _ = pretrain(url, tmp_path / "a", *cache)
    (held,) = (path.parent for path in (tmp_path / "cache").rglob("shards"))
    flip_in_record(held, 1, 2)
    index = held / "index.parquet"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    code, again, err = pretrain(url, tmp_path / "b", *cache)
    assert (code, again) == (0, first), err


def test_a_shard_that_is_not_there_stops_or_is_gone_without(small_store, pretrain, tmp_path):
    shutil.copytree(small_store, tmp_path / "s")
    (tmp_path / "s" / "shards" / "00002.safetensors").unlink()
    for number, url in enumerate((str(tmp_path / "s"), f"file://{tmp_path / 's'}")):
        cache = ["--cache", str(tmp_path / "cache")]
        code, _, err = pretrain(url, tmp_path / f"a{number}", *cache)
        assert code == 2
        assert "00002.safetensors" in err
        assert "Traceback" not in err
        assert pretrain(url, tmp_path / f"b{number}", *cache, "--on-damage", "skip")[0] == 0


def test_the_window_is_chosen_by_the_cache_and_kept_when_the_run_goes_on(server, small_store, pretrain, tmp_path):
    url, _ = server
    total = sum(path.stat().st_size for path in small_store.rglob("*") if path.is_file())
    cache = ["--cache", str(tmp_path / "cache")]
    assert pretrain(url, tmp_path / "r", *cache, "--cache-size", str(1.05 * total / 1e9))[0] == 0
    window = json.loads((tmp_path / "r" / "run.json").read_text())["options"]["shuffle_window"]
    assert window == 1
    code, _, err = pretrain(url, tmp_path / "r", *cache)  # all of it would fit now
    assert code == 0, err
    assert json.loads((tmp_path / "r" / "run.json").read_text())["options"]["shuffle_window"] == 1


def test_a_store_that_is_not_there_is_one_line(server, pretrain, tmp_path):
    url, _ = server
    code, _, err = pretrain(f"{url}-none", tmp_path / "r", "--cache", str(tmp_path / "cache"))
    assert code == 2
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert f"{url}-none" in err
