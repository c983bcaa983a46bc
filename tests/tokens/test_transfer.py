"""What a server may cost that lies about its files: one line that names the URL, bounded bytes, bounded time."""

import contextlib
import os
import signal
import threading
import time

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from fastmae.errors import InputError
from fastmae.tokens import transfer
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.files import MOST_BYTES, RemoteFiles
from lying_server import Lies, LyingServer

pytestmark = pytest.mark.promise("remote")

SHARD = "shards/00000.safetensors"
LIMIT = 3_000_000
"""Of the cache. It holds the shard several times."""
LIES = {
    Lies.endless: "more bytes come, not ",
    Lies.petabyte: "has 1125899906842624 bytes, not ",
    Lies.drips: r"can't be fetched \(less than 2 kB came in 0.2 s, tried 2 times\); check the address and the network",
    Lies.stalls: r"can't be fetched \(less than 2 kB came in 0.2 s",
    Lies.silent: r"can't be fetched \(less than 2 kB came in 0.2 s",
    Lies.drips_headers: r"can't be fetched \(less than 2 kB came in 0.2 s",
    Lies.endless_headers: "can't be fetched",
    Lies.web_page: "the server answered with a web page, not the file; check the address",
    Lies.cut: "can't be fetched",
    Lies.bomb: r"the server sends it compressed \(gzip\); have it serve",
    Lies.to_a_file: r"leads to an address that is no http:// or https:// \(file:///etc/passwd\); check the address",
    Lies.in_circles: "the server redirects without end; check the address",
    Lies.forbidden: "no permission; give the credentials that http:// takes",
}


@pytest.fixture
def server(small_store, monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_AFTER", (0.01,))
    monkeypatch.setattr(transfer, "SLOW_AFTER", 0.2)
    with LyingServer(small_store) as server:
        server.pause = 0.02
        yield server


@pytest.fixture
def cache(tmp_path):
    """A cache's folder, and a function: the most bytes that it has held at any moment."""
    folder, most, done = tmp_path / "cache", [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            most[0] = max(most[0], held(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield folder, lambda: most[0]
    done.set()
    thread.join()


def held(folder):
    """Bytes of all files in a folder but the locks: as long as they seem, or as much as they take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.suffix != ".lock":
                total += max(path.stat().st_size, 512 * path.stat().st_blocks)
    return total


def size_of(server, name):
    return (server.folder / name).stat().st_size


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("name", ["store.json", SHARD])
def test_a_lie_about_a_file_costs_one_line_and_no_byte_too_many(name, lie, server, cache):
    folder, most_held = cache
    server.lies[name] = lie
    files = RemoteFiles(server.url, folder, LIMIT)
    size = size_of(server, SHARD)
    if name == SHARD:
        files.pin("v1", {SHARD: size})
    start = time.monotonic()
    with pytest.raises(InputError, match=f"^{server.url}/{name}: {LIES[lie]}") as caught:
        files.path(name)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert most_held() <= size + 4096  # a disk gives whole blocks
    assert held(folder) == 0
    server.lies.clear()  # nothing of it stays behind, the room in the cache neither
    assert files.path(name).read_bytes() == (server.folder / name).read_bytes()


@pytest.mark.parametrize("lie", [Lies.shorter, Lies.longer, Lies.untold_longer], ids=lambda lie: lie.__name__)
def test_a_shard_of_another_size_than_in_the_manifest_is_refused_without_a_retry(lie, server, cache):
    server.lies[SHARD] = lie
    files = RemoteFiles(server.url, cache[0], LIMIT)
    files.pin("v1", {SHARD: (size := size_of(server, SHARD))})
    cause = {Lies.shorter: f"has {size - 1} bytes", Lies.longer: f"has {size + 1} bytes"}.get(lie, "more bytes come")
    with pytest.raises(InputError, match=f"{server.url}/{SHARD}: {cause}, not the {size} of the store's manifest; "):
        files.path(SHARD)
    assert server.requests[SHARD] == 1
    assert cache[1]() <= size + 4096


def test_a_file_that_may_be_large_is_refused_at_its_limit(server, monkeypatch, cache):
    monkeypatch.setitem(MOST_BYTES, "store.json", size_of(server, "store.json"))
    files = RemoteFiles(server.url, cache[0], LIMIT)
    assert files.path("store.json").stat().st_size == MOST_BYTES["store.json"]
    server.lies["store.json"] = Lies.untold_longer
    most = f"{MOST_BYTES['store.json'] / 1e6:.4g} MB"
    with pytest.raises(InputError, match=f"{server.url}/store.json: more bytes come, not at most the {most} that such"):
        RemoteFiles(server.url, cache[0], LIMIT).path("store.json")


def test_a_transfer_above_the_least_rate_may_take_any_number_of_periods(server, monkeypatch):
    monkeypatch.setattr(transfer, "LEAST_RATE", 5)
    monkeypatch.setattr(transfer, "SLOW_AFTER", 0.4)
    server.pause = 0.001
    server.lies["store.json"] = Lies.drips
    start = time.monotonic()
    assert transfer.read(server.url, "store.json", 1 << 20) == (server.folder / "store.json").read_bytes()
    assert time.monotonic() - start > transfer.SLOW_AFTER


def test_a_prefetch_obeys_the_same_limits(server, cache):
    folder, most_held = cache
    size = size_of(server, SHARD)
    shards = [SHARD, SHARD.replace("0.", "1.")]
    files = RemoteFiles(server.url, folder, LIMIT)
    files.pin("v1", dict.fromkeys(shards, size))
    server.lies = {shards[0]: Lies.endless, shards[1]: Lies.drips}
    files.prefetch(shards)
    deadline = time.monotonic() + 5
    while files._prefetcher._threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sum(server.requests.values()) == 3  # the slow one is tried again
    assert most_held() <= 2 * (size + 4096)
    assert held(folder) == 0


def test_ctrl_c_ends_a_stalled_download_at_once_and_leaves_no_part(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SLOW_AFTER", 60)
    server.lies[SHARD] = Lies.stalls
    files = RemoteFiles(server.url, tmp_path / "cache", LIMIT)
    files.pin("v1", {SHARD: size_of(server, SHARD)})
    threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        files.path(SHARD)
    assert 0.4 < time.monotonic() - start < 3
    assert held(tmp_path / "cache") == 0


@pytest.fixture
def object_storage(monkeypatch, tmp_path):
    """A file system as fsspec has them for S3 and Google's storage: its URL, and the ranges that were asked for."""
    asked = []

    class ObjectStorage(AsyncFileSystem):
        protocol = "objects"

        async def _cat_file(self, path, start=None, end=None, **_):
            data = fsspec.filesystem("memory").cat_file(f"/{path}")
            if start >= len(data):
                raise OSError("InvalidRange")  # as S3 has it
            asked.append((start, end))
            return data[start:end]

    monkeypatch.setattr(transfer, "RANGE", 1000)
    fsspec.register_implementation("objects", ObjectStorage, clobber=True)
    return f"objects://{tmp_path.name}", asked


@pytest.mark.parametrize("size", [2, 999, 1000, 1001, 9000, 12345])
def test_object_storage_is_read_in_ranges(size, object_storage, tmp_path):
    url, asked = object_storage
    data = os.urandom(size)
    with fsspec.open(f"memory://{tmp_path.name}/x", "wb") as file:
        file.write(data)
    part = tmp_path / "part"
    part.write_bytes(bytes(size))
    transfer.download(url, "x", part, size)
    assert part.read_bytes() == data
    starts = range(0, size, 1000)
    assert sorted(asked) == [(start, size + 1 if start + 1000 >= size else start + 1000) for start in starts]
    assert transfer.read(url, "x", size) == data
    with pytest.raises(InputError, match=f"{url}/x: more bytes come, not at most"):
        transfer.read(url, "x", size - 1)
    part.write_bytes(bytes(size - 1))
    with pytest.raises(InputError, match=f"{url}/x: more bytes come, not the {size - 1} of"):
        transfer.download(url, "x", part, size - 1)
    assert part.stat().st_size == size - 1
    with pytest.raises(MissingFileError, match=f"{url}/y: no such file"):
        transfer.read(url, "y", size)


def test_a_file_url_that_leads_to_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "store.json")
    with pytest.raises(InputError, match=f"{tmp_path}/store.json: is a named pipe"):
        transfer.read(f"file://{tmp_path}", "store.json", 100)


def test_a_chain_of_urls_is_refused(server):
    with pytest.raises(InputError, match=r"simplecache::http.*: is a chain of URLs; give a folder, or a URL of"):
        transfer.read(f"simplecache::{server.url}", "store.json", 100)
