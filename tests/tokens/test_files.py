"""The files of stores behind an HTTP server on this machine and behind fsspec's memory and local file systems."""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from fastmae.errors import InputError
from fastmae.tokens import files as files_module
from fastmae.tokens import transfer
from fastmae.tokens.cache import BoundedFolder
from fastmae.tokens.files import LocalFiles, MissingFileError, RemoteFiles, is_url, open_files

SHARD = 50_000
SHARDS = [f"shards/{number:05d}.safetensors" for number in range(12)]
SIZES = dict.fromkeys(SHARDS, SHARD)
FORK = multiprocessing.get_context("fork")


def content(name, version="a"):
    return (
        (f"{version} {name} " * SHARD)[:SHARD].encode() if name.startswith("shards") else f"{version} {name}".encode()
    )


class StoreServer(ThreadingHTTPServer):
    """Serves a store, counts the requests, and fails on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StoreHandler)
        self.files = {f"/store/{name}": content(name) for name in ["store.json", "manifest.json", *SHARDS]}
        self.fetched = Counter()  # requests by path
        self.drops = Counter()  # path -> how many of the next answers are cut half-way
        self.status = {}  # path -> HTTP status to answer with
        self.pause = 0.0  # seconds in the middle of every answer
        self.tells_length = True
        self.url = f"http://127.0.0.1:{self.server_port}/store"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def gets(self, name):
        return self.fetched[f"/store/{name}"]


class StoreHandler(BaseHTTPRequestHandler):
    server: StoreServer

    def do_GET(self):
        self.server.fetched[self.path] += 1
        if (data := self.answer(self.server.tells_length)) is not None:
            half = len(data) // 2
            self.wfile.write(data[:half])
            time.sleep(self.server.pause)
            if self.server.drops[self.path] > 0:
                self.server.drops[self.path] -= 1
                return
            self.wfile.write(data[half:])

    def answer(self, tells_length):
        data = self.server.files.get(self.path)
        status = self.server.status.get(self.path, 404 if data is None else 200)
        self.send_response(status)
        if data is not None and tells_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data if status == 200 else None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_AFTER", (0.0, 0.01, 0.01))
    server = StoreServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["http", "memory", "file"])
def url(request, server, tmp_path):
    """The same store behind three kinds of URL."""
    if request.param == "http":
        return server.url
    root = f"memory://{tmp_path.name}/store" if request.param == "memory" else f"file://{tmp_path}/elsewhere/store"
    for path, data in server.files.items():
        with fsspec.open(f"{root}/{path.removeprefix('/store/')}", "wb", auto_mkdir=True) as file:
            file.write(data)
    return root


def remote(url, tmp_path, shards=100, version="v1"):
    files = RemoteFiles(url, tmp_path / "cache", shards * SHARD + 1000)
    if version:
        files.pin(version, SIZES)
    return files


def held(tmp_path):
    """Bytes of each file that the cache holds of one version of one store, by name; without locks."""
    files = {}
    for path in (tmp_path / "cache").glob("*/*/**/*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.suffix != ".lock":
                files["/".join(path.relative_to(tmp_path / "cache").parts[2:])] = path.stat().st_size
    return files


def in_fork(function, *args):
    """The result of a call in a forked process."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(daemon=True, target=lambda: there.send(function(*args)))
    process.start()
    assert here.poll(30)
    result = here.recv()
    process.join()
    assert process.exitcode == 0
    return result


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_location_with_a_scheme_is_a_url_and_anything_else_is_a_folder(tmp_path):
    assert [is_url(text) for text in ("s3://b/s", "file:///s", "/data/s", "s", "c:/s")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert open_files("s3://b/s/", tmp_path, 1).location == "s3://b/s"
    for folder in (str(tmp_path), tmp_path):
        files = open_files(folder, tmp_path / "cache", 1)
        assert isinstance(files, LocalFiles)
        assert files.location == str(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_local_files_are_read_in_place(tmp_path):
    files = LocalFiles(tmp_path)
    assert files.path(SHARDS[0]) == tmp_path / SHARDS[0]
    assert not files.exists("store.json")
    files.path("store.json").write_text("{}")
    assert files.exists("store.json")
    files.pin("v1", SIZES)
    files.prefetch(SHARDS)
    assert not files.discard("store.json")
    assert files.exists("store.json")


def test_every_kind_of_url_gives_the_bytes_of_the_store(url, tmp_path):
    files = remote(url, tmp_path, version=None)
    assert files.path("store.json").read_bytes() == content("store.json")
    files.pin("v1", SIZES)
    assert files.path(SHARDS[3]).read_bytes() == content(SHARDS[3])
    assert [files.exists(name) for name in ("store.json", SHARDS[4], "scales.json")] == [True, True, False]
    with pytest.raises(MissingFileError, match=f"{url}/scales.json"):
        files.path("scales.json")
    copy = pickle.loads(pickle.dumps(files))
    assert copy.path(SHARDS[5]).read_bytes() == content(SHARDS[5])


def test_each_object_fetches_a_file_once_before_the_version_is_known(server, tmp_path):
    first = remote(server.url, tmp_path, version=None)
    assert first.path("store.json").read_bytes() == first.path("store.json").read_bytes() == content("store.json")
    assert pickle.loads(pickle.dumps(first)).path("store.json").read_bytes() == content("store.json")
    assert server.gets("store.json") == 1
    server.files["/store/store.json"] = content("store.json", "b")
    assert remote(server.url, tmp_path, version=None).path("store.json").read_bytes() == content("store.json", "b")


def test_versions_of_a_store_never_mix(server, tmp_path):
    old = remote(server.url, tmp_path)
    old_path = old.path(SHARDS[0])
    server.files[f"/store/{SHARDS[0]}"] = content(SHARDS[0], "b")
    new = remote(server.url, tmp_path, version="v2")
    assert new.path(SHARDS[0]).read_bytes() == content(SHARDS[0], "b")
    assert old.path(SHARDS[0]) == old_path != new.path(SHARDS[0])
    assert old_path.read_bytes() == content(SHARDS[0])
    with pytest.raises(AssertionError, match="version"):
        remote(server.url, tmp_path, version=None).path(SHARDS[0])


def test_objects_share_what_was_fetched_of_a_version_and_stores_never_mix(server, tmp_path):
    for _ in range(2):
        assert remote(server.url, tmp_path).path(SHARDS[0]).read_bytes() == content(SHARDS[0])
    assert server.gets(SHARDS[0]) == 1
    server.files["/other/" + SHARDS[0]] = content(SHARDS[0], "b")
    other = remote(server.url.replace("store", "other"), tmp_path)
    assert other.path(SHARDS[0]).read_bytes() == content(SHARDS[0], "b")


@pytest.mark.promise("remote")
def test_a_file_of_another_size_is_refused(server, tmp_path):
    files = remote(server.url, tmp_path, version=None)
    files.pin("v1", {SHARDS[0]: SHARD, SHARDS[1]: SHARD - 1})
    files.path(SHARDS[0])
    with pytest.raises(InputError, match=f"{server.url}/{SHARDS[1]}: has {SHARD} bytes, not the {SHARD - 1} of the"):
        files.path(SHARDS[1])
    assert server.gets(SHARDS[1]) == 1
    assert held(tmp_path) == {SHARDS[0]: SHARD}


def test_the_least_recently_used_shards_are_evicted_and_stay_readable_while_open(url, tmp_path):
    files = remote(url, tmp_path, shards=3)
    files.path("store.json")
    for number in (0, 1, 2, 0, 3):  # 0 is used again before 3 evicts 1
        files.path(SHARDS[number])
        time.sleep(0.01)
    assert sorted(held(tmp_path)) == [SHARDS[0], SHARDS[2], SHARDS[3], "store.json"]
    mapped = files.path(SHARDS[4]).open("rb")
    for number in (5, 6, 7):
        files.path(SHARDS[number])
    assert SHARDS[4] not in held(tmp_path)
    assert mapped.read() == content(SHARDS[4])
    mapped.close()


def test_no_more_shards_are_evicted_than_must(tmp_path):
    names = [f"shards/{number:05d}.safetensors" for number in range(70)]
    for name in names:
        with fsspec.open(f"memory://{tmp_path.name}/{name}", "wb") as file:
            file.write(bytes(1000 if name == names[0] else 100))
    files = RemoteFiles(f"memory://{tmp_path.name}", tmp_path / "cache", 6400)
    files.pin("v1", dict.fromkeys(names, 100) | {names[0]: 1000})
    for name in names[:55]:
        files.path(name)
    assert sorted(held(tmp_path)) == names[:55]  # 1000 + 54 * 100: full
    for name in names[55:65]:
        files.path(name)
    assert sorted(held(tmp_path)) == names[1:65]  # the large one went alone: full again
    files.path(names[65])
    assert sorted(held(tmp_path)) == names[2:66]


def test_the_files_of_a_cache_are_counted_again_only_when_the_room_that_was_left_is_used_up(tmp_path, monkeypatch):
    counted = []
    contents = BoundedFolder._contents
    monkeypatch.setattr(
        BoundedFolder, "_contents", lambda cache: counted.append(len(held(tmp_path))) or contents(cache)
    )
    names = [f"shards/{number:05d}.safetensors" for number in range(300)]
    for name in names:
        with fsspec.open(f"memory://{tmp_path.name}/{name}", "wb") as file:
            file.write(bytes(100))
    files = RemoteFiles(f"memory://{tmp_path.name}", tmp_path / "cache", 25600)
    files.pin("v1", dict.fromkeys(names, 100))
    for name in names[:256]:
        files.path(name)
    assert counted == [0]
    files.path(names[256])
    assert counted == [0, 256]
    assert sorted(held(tmp_path)) == names[3:257]  # one had to go, and two more that take 1/128 of the limit
    for name in names[257:259]:
        files.path(name)
    assert len(counted) == 2
    assert sorted(held(tmp_path)) == names[3:259]
    smaller = RemoteFiles(f"memory://{tmp_path.name}", tmp_path / "cache", 12800)
    smaller.pin("v1", dict.fromkeys(names, 100))
    smaller.path(names[259])  # what was noted under another limit says nothing
    assert sorted(held(tmp_path)) == names[133:260]


def complete_and_arriving_bytes(folder):
    """Bytes of the complete files in a folder, and of the downloads under way."""
    total = Counter()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                total[path.suffix == ".part"] += path.stat().st_size
    return total[False], total[True]


def opened(files, name):
    """A file, opened; another process may evict it in between, any number of times."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return files.path(name).open("rb")


def test_the_cache_keeps_its_limit_with_several_stores_and_processes(server, tmp_path):
    server.files |= {path.replace("store", "other", 1): data for path, data in server.files.items()}
    server.pause = 0.01
    (tmp_path / "cache").mkdir()

    def read(url, seed):
        files = remote(url, tmp_path, shards=4)
        for step in range(24):
            name = SHARDS[(step * 5 + seed) % 12]
            assert opened(files, name).read() == content(name)

    processes = [
        FORK.Process(daemon=True, target=read, args=(url, seed))
        for seed, url in enumerate([server.url, server.url.replace("store", "other")])
    ]
    for process in processes:
        process.start()
    most_complete = most_in_all = 0
    while any(process.is_alive() for process in processes):
        with FileLock(tmp_path / "cache" / ".lock"):  # files are evicted and take their places under this lock
            complete, arriving = complete_and_arriving_bytes(tmp_path / "cache")
        most_complete, most_in_all = max(most_complete, complete), max(most_in_all, complete + arriving)
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0]
    assert 3 * SHARD < most_complete <= 4 * SHARD + 1000
    assert most_in_all <= 4 * SHARD + 1000  # downloads under way are in it
    assert complete_and_arriving_bytes(tmp_path / "cache")[1] == 0


def test_processes_that_share_a_cache_fetch_a_file_once(server, tmp_path):
    server.pause = 0.05
    files = remote(server.url, tmp_path)
    processes = [FORK.Process(daemon=True, target=lambda: [files.path(name) for name in SHARDS[:3]]) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [server.gets(name) for name in SHARDS[:4]] == [1, 1, 1, 0]
    assert held(tmp_path) == dict.fromkeys(SHARDS[:3], SHARD)


@pytest.mark.parametrize("next_name", SHARDS[:2])
def test_what_a_killed_download_left_is_deleted(next_name, server, tmp_path):
    server.pause = 60
    files = remote(server.url, tmp_path, shards=1)
    process = FORK.Process(daemon=True, target=files.path, args=(SHARDS[0],))
    process.start()
    wait_until(lambda: any(name.endswith(".part") and size for name, size in held(tmp_path).items()))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.pause = 0
    # The file whose download was killed, or another file that needs the room.
    assert files.path(next_name).read_bytes() == content(next_name)
    assert held(tmp_path) == {next_name: SHARD}


def test_a_transfer_that_drops_half_way_is_tried_again(server, tmp_path):
    server.drops[f"/store/{SHARDS[0]}"] = 2
    assert remote(server.url, tmp_path).path(SHARDS[0]).read_bytes() == content(SHARDS[0])
    assert server.gets(SHARDS[0]) == 3


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_transfer_that_keeps_failing_is_refused_and_leaves_no_file(tells_length, server, tmp_path):
    server.drops[f"/store/{SHARDS[0]}"], server.tells_length = 9, tells_length
    with pytest.raises(InputError, match=f"{server.url}/{SHARDS[0]}: .*4 times") as caught:
        remote(server.url, tmp_path).path(SHARDS[0])
    assert "\n" not in str(caught.value)
    assert server.gets(SHARDS[0]) == 4
    assert held(tmp_path) == {}


@pytest.mark.promise("remote")
def test_files_of_unknown_size_count_towards_the_limit(server, tmp_path):
    server.tells_length = False
    files = RemoteFiles(server.url, tmp_path / "cache", 2 * SHARD + 20)
    files.pin("v1", SIZES)
    for name in [*SHARDS[:2], "store.json", "manifest.json"]:
        assert files.path(name).read_bytes() == content(name)
    assert sorted(held(tmp_path)) == ["manifest.json", SHARDS[1], "store.json"]


@pytest.mark.parametrize(
    ("status", "message"), [(403, "no permission; give the credentials that http://"), (404, "no such file")]
)
def test_missing_and_forbidden_files_are_refused_without_a_retry(status, message, server, tmp_path):
    server.status[f"/store/{SHARDS[0]}"] = status
    files = remote(server.url, tmp_path)
    assert not files.exists(SHARDS[0])
    assert server.gets(SHARDS[0]) == 1
    with pytest.raises(MissingFileError, match=f"{server.url}/{SHARDS[0]}: {message}"):
        files.path(SHARDS[0])
    assert server.gets(SHARDS[0]) == 2


def test_asking_whether_a_file_exists_is_tried_again_too(server, tmp_path):
    server.status[f"/store/{SHARDS[0]}"] = 503
    with pytest.raises(InputError, match=f"{server.url}/{SHARDS[0]}: .*503.*4 times"):
        remote(server.url, tmp_path).exists(SHARDS[0])
    assert server.gets(SHARDS[0]) == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://no-such-host.invalid/store", "http://no-such-host.invalid/store/store.json"),
        ("http://127.0.0.1:9/store", "http://127.0.0.1:9/store/store.json"),
        (
            "lacking://bucket/store",
            r"lacking://bucket/store: .*pip install no_such_package",
        ),
        ("nonsense://bucket/store", "nonsense://bucket/store: .*nonsense"),
    ],
)
def test_an_unusable_url_is_refused_by_name(url, message, server, tmp_path):
    fsspec.register_implementation("lacking", "no_such_package.FileSystem", errtxt="Install it", clobber=True)
    for method in (RemoteFiles.path, RemoteFiles.exists):
        with pytest.raises(InputError, match=message) as caught:
            method(remote(url, tmp_path), "store.json")
        assert "\n" not in str(caught.value)


def test_a_shard_larger_than_the_cache_is_refused_with_the_sizes(url, tmp_path):
    files = RemoteFiles(url, tmp_path / "cache", SHARD - 1)
    files.pin("v1", SIZES)
    files.path("store.json")
    with pytest.raises(
        InputError,
        match=f"{tmp_path / 'cache'}: .* 0.05 MB, but 00000.safetensors takes 0.05 MB beside 1.2e-05 MB",
    ):
        files.path(SHARDS[0])


def test_a_full_disk_is_reported_with_the_name_of_the_file(server, tmp_path):
    def fetch():
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, SHARD // 2))
        try:
            remote(server.url, tmp_path).path(SHARDS[0])
        except OSError as error:
            return str(error)

    message = in_fork(fetch)
    assert "File too large" in message
    assert "00000.safetensors" in message
    assert held(tmp_path) == {}


def test_a_prefetched_file_needs_no_further_request(server, tmp_path):
    files = remote(server.url, tmp_path)
    files.prefetch(SHARDS[:6])
    wait_until(lambda: held(tmp_path) == dict.fromkeys(SHARDS[:6], SHARD))
    assert server.gets(SHARDS[6]) == 0
    server.shutdown()
    for name in SHARDS[:6]:
        assert files.path(name).read_bytes() == content(name)


def test_a_prefetch_replaces_what_the_last_one_still_had_to_fetch(server, tmp_path):
    server.pause = 0.2
    files = remote(server.url, tmp_path)
    files.prefetch(SHARDS[:6])
    wait_until(lambda: server.fetched.total() == 2)
    files.prefetch(SHARDS[6:8])
    wait_until(lambda: len([name for name in held(tmp_path) if name in SHARDS]) == 4)
    assert [name for name in SHARDS if server.gets(name)] == [*SHARDS[:2], *SHARDS[6:8]]


def test_the_error_of_a_prefetch_is_raised_when_the_file_is_needed(server, tmp_path):
    files = remote(server.url, tmp_path)
    server.status[f"/store/{SHARDS[0]}"] = 403
    files.prefetch(SHARDS[:2])
    wait_until(lambda: SHARDS[1] in held(tmp_path))
    with pytest.raises(MissingFileError, match="no permission"):
        files.path(SHARDS[0])
    remote("nonsense://store", tmp_path).prefetch(SHARDS)


def test_a_prefetch_evicts_neither_upcoming_files_nor_the_last_one_used(server, tmp_path):
    files = remote(server.url, tmp_path, shards=3)
    for name in SHARDS[:3]:
        files.path(name)
        time.sleep(0.01)
    files.prefetch([SHARDS[0], SHARDS[3]])  # 0 is upcoming, 2 was used last
    wait_until(lambda: SHARDS[3] in held(tmp_path))
    assert sorted(held(tmp_path)) == [SHARDS[0], SHARDS[2], SHARDS[3]]
    small = remote(server.url, tmp_path / "small", shards=1)
    last_used = small.path(SHARDS[0])
    small.prefetch([SHARDS[1]])
    wait_until(lambda: small._prefetcher._threads == 0)
    assert last_used.exists()


def test_a_prefetch_fills_the_cache_with_what_is_needed_first_and_stops(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "PREFETCH_THREADS", 1)  # two may overtake each other by one file
    files = remote(server.url, tmp_path, shards=3)
    for _ in range(3):
        files.prefetch(SHARDS[:8])
        wait_until(lambda: files._prefetcher._threads == 0)
        assert sorted(held(tmp_path)) == SHARDS[:3]
    assert server.fetched.total() == 3
    server.files[f"/other/{SHARDS[0]}"] = content(SHARDS[0])
    other = remote(server.url.replace("store", "other"), tmp_path, shards=3)  # of the same process
    other.prefetch(SHARDS[:1])
    wait_until(lambda: other._prefetcher._threads == 0)
    assert server.fetched.total() == 3
    files.path(SHARDS[8])  # needed now: evicts what is needed last
    assert sorted(held(tmp_path)) == [*SHARDS[:2], SHARDS[8]]


class Reading(Dataset):
    """Whether each shard has its bytes, read in loader workers."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(SHARDS)

    def __getitem__(self, index):
        return self.files.path(SHARDS[index]).read_bytes() == content(SHARDS[index])


def test_forked_loader_workers_and_their_parent_fetch_side_by_side(server, tmp_path):
    files = remote(server.url, tmp_path)
    files.path("store.json")
    server.pause = 0.3
    files.prefetch(SHARDS[:2])  # the workers are forked while the parent's threads fetch these under its locks
    wait_until(lambda: server.fetched.total() == 3)
    loader = iter(DataLoader(Reading(files), num_workers=2, batch_size=1))
    server.pause = 0
    assert files.path("manifest.json").read_bytes() == content("manifest.json")
    assert all(bool(same) for same in loader)
    assert files.path(SHARDS[0]).read_bytes() == content(SHARDS[0])
    assert [server.gets(name) for name in SHARDS] == [1] * len(SHARDS)


def test_a_forked_process_prefetches_with_threads_of_its_own(server, tmp_path):
    server.pause = 0.3
    files = remote(server.url, tmp_path)
    files.prefetch(SHARDS[:2])  # the parent's two threads are busy
    wait_until(lambda: server.fetched.total() == 2)

    def prefetch():
        files.prefetch(SHARDS[2:3])
        wait_until(lambda: SHARDS[2] in held(tmp_path))
        return True

    assert in_fork(prefetch)
