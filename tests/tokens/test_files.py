"""Stores behind real servers: an HTTP server on this machine, and fsspec's memory and local file systems."""

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
from fastmae.tokens.files import LocalFiles, MissingFileError, RemoteFiles, is_url, open_files

SHARD = 50_000
SHARDS = [f"shards/{number:05d}.safetensors" for number in range(12)]
FORK = multiprocessing.get_context("fork")


def content(name, version="a"):
    return (
        (f"{version} {name} " * SHARD)[:SHARD].encode() if name.startswith("shards") else f"{version} {name}".encode()
    )


class StoreServer(ThreadingHTTPServer):
    """Serves a store, counts what it was asked for, and misbehaves on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StoreHandler)
        self.files = {f"/store/{name}": content(name) for name in ["store.json", "manifest.json", *SHARDS]}
        self.fetched, self.asked = Counter(), Counter()
        self.drops = Counter()  # path -> answers yet to be cut half-way
        self.status = {}  # path -> an error to answer with
        self.pause = 0.0  # in the middle of every answer, in seconds
        self.tells_length = True
        self.url = f"http://127.0.0.1:{self.server_port}/store"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def gets(self, name):
        return self.fetched[f"/store/{name}"]


class StoreHandler(BaseHTTPRequestHandler):
    server: StoreServer

    def do_HEAD(self):
        self.server.asked[self.path] += 1
        self.answer(tells_length=True)

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
    monkeypatch.setattr(files_module, "RETRY_AFTER", (0.0, 0.01, 0.01))
    server = StoreServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["http", "memory", "file"])
def url(request, server, tmp_path):
    """The same store behind three kinds of URL."""
    if request.param == "http":
        return server.url
    place = f"memory://{tmp_path.name}/store" if request.param == "memory" else f"file://{tmp_path}/elsewhere/store"
    for path, data in server.files.items():
        with fsspec.open(f"{place}/{path.removeprefix('/store/')}", "wb", auto_mkdir=True) as file:
            file.write(data)
    return place


def remote(url, tmp_path, shards=100, version="v1"):
    files = RemoteFiles(url, tmp_path / "cache", shards * SHARD + 1000)
    if version:
        files.pin(version)
    return files


def held(tmp_path):
    """What the cache holds, of one version of one store: name -> bytes; locks and reservations aside."""
    files = {}
    for path in (tmp_path / "cache").glob("*/*/**/*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.suffix not in {".lock", ".reserved"}:
                files["/".join(path.relative_to(tmp_path / "cache").parts[2:])] = path.stat().st_size
    return files


def in_fork(function, *args):
    """What a forked process makes of a call."""
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


def test_a_location_with_a_scheme_is_a_url_and_all_else_a_folder(tmp_path):
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


def test_a_folders_files_are_where_they_are(tmp_path):
    files = LocalFiles(tmp_path)
    assert files.path(SHARDS[0]) == tmp_path / SHARDS[0]
    assert not files.exists("store.json")
    files.path("store.json").write_text("{}")
    assert files.exists("store.json")
    files.pin("v1")
    files.prefetch(SHARDS)


def test_any_kind_of_url_gives_the_stores_bytes(url, tmp_path):
    files = remote(url, tmp_path, version=None)
    assert files.path("store.json").read_bytes() == content("store.json")
    files.pin("v1")
    assert files.path(SHARDS[3]).read_bytes() == content(SHARDS[3])
    assert [files.exists(name) for name in ("store.json", SHARDS[4], "codebooks.safetensors")] == [True, True, False]
    with pytest.raises(MissingFileError, match=r"codebooks.safetensors: no such file"):
        files.path("codebooks.safetensors")
    copy = pickle.loads(pickle.dumps(files))
    assert copy.path(SHARDS[5]).read_bytes() == content(SHARDS[5])


def test_each_opening_fetches_anew_and_only_once(server, tmp_path):
    first = remote(server.url, tmp_path, version=None)
    assert first.path("store.json").read_bytes() == first.path("store.json").read_bytes() == content("store.json")
    assert pickle.loads(pickle.dumps(first)).path("store.json").read_bytes() == content("store.json")
    assert server.gets("store.json") == 1
    server.files["/store/store.json"] = content("store.json", "b")
    assert remote(server.url, tmp_path, version=None).path("store.json").read_bytes() == content("store.json", "b")


def test_a_rebuilt_store_never_gets_the_shards_of_the_old_one(server, tmp_path):
    old = remote(server.url, tmp_path)
    old_path = old.path(SHARDS[0])
    server.files[f"/store/{SHARDS[0]}"] = content(SHARDS[0], "b")
    new = remote(server.url, tmp_path, version="v2")
    assert new.path(SHARDS[0]).read_bytes() == content(SHARDS[0], "b")
    assert old.path(SHARDS[0]) == old_path != new.path(SHARDS[0])
    assert old_path.read_bytes() == content(SHARDS[0])
    with pytest.raises(AssertionError, match="version"):
        remote(server.url, tmp_path, version=None).path(SHARDS[0])


def test_a_version_is_fetched_once_for_all_objects_and_stores_do_not_mix(server, tmp_path):
    for _ in range(2):
        assert remote(server.url, tmp_path).path(SHARDS[0]).read_bytes() == content(SHARDS[0])
    assert server.gets(SHARDS[0]) == 1
    server.files["/other/" + SHARDS[0]] = b"another store's"
    assert remote(server.url.replace("store", "other"), tmp_path).path(SHARDS[0]).read_bytes() == b"another store's"


def test_known_sizes_save_asking_and_show_a_store_that_was_rebuilt(server, tmp_path):
    files = remote(server.url, tmp_path, version=None)
    files.pin("v1", {SHARDS[0]: SHARD, SHARDS[1]: SHARD - 1})
    files.path(SHARDS[0])
    assert server.asked.total() == 0
    with pytest.raises(InputError, match=rf"{SHARDS[1]}: can't be fetched \({SHARD} bytes came instead of {SHARD - 1}"):
        files.path(SHARDS[1])
    assert held(tmp_path) == {SHARDS[0]: SHARD}


def test_the_shards_that_were_not_asked_for_the_longest_give_way(url, tmp_path):
    files = remote(url, tmp_path, shards=3)
    files.path("store.json")
    for number in (0, 1, 2, 0, 3):  # 0 is used again before 3 takes the room of 1
        files.path(SHARDS[number])
        time.sleep(0.01)
    assert sorted(held(tmp_path)) == [SHARDS[0], SHARDS[2], SHARDS[3], "store.json"]
    mapped = files.path(SHARDS[4]).open("rb")
    for number in (5, 6, 7):
        files.path(SHARDS[number])
    assert SHARDS[4] not in held(tmp_path)
    assert mapped.read() == content(SHARDS[4])
    mapped.close()


def test_of_small_shards_a_few_give_way_at_once_and_of_large_ones_no_more_than_must(tmp_path):
    names = [f"shards/{number:05d}.safetensors" for number in range(70)]
    for name in names:
        with fsspec.open(f"memory://{tmp_path.name}/{name}", "wb") as file:
            file.write(bytes(1000 if name == names[0] else 100))
    files = RemoteFiles(f"memory://{tmp_path.name}", tmp_path / "cache", 6400)
    files.pin("v1")
    for name in names[:55]:
        files.path(name)
    assert sorted(held(tmp_path)) == names[:55]  # 1000 + 54 * 100: full
    for name in names[55:65]:
        files.path(name)
    assert sorted(held(tmp_path)) == names[1:65]  # the large one went alone: full again
    files.path(names[65])
    assert sorted(held(tmp_path)) == names[4:66]  # one must go, and a 32nd of 6400 bytes more


def total_bytes(folder):
    """Bytes in a folder; of a file that is about to be renamed, only once."""
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.suffix != ".reserved" and path.name != ".used":
                target = path.with_name(path.name.split(".safetensors")[0])
                sizes[target] = max(sizes.get(target, 0), path.stat().st_size)
    return sum(sizes.values())


def opened(files, name):
    """A file, however often another process takes its room between its being named and its being opened."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return files.path(name).open("rb")


def test_all_stores_and_processes_together_keep_the_cache_within_its_limit(server, tmp_path):
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
    most = 0
    while any(process.is_alive() for process in processes):
        with FileLock(
            tmp_path / "cache" / ".lock"
        ):  # or a file that gives way is counted together with the one that comes
            most = max(most, total_bytes(tmp_path / "cache"))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0]
    assert 3 * SHARD < most <= 4 * SHARD + 1000


def test_processes_of_one_machine_fetch_a_file_once(server, tmp_path):
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
def test_a_killed_download_leaves_nothing_that_counts(next_name, server, tmp_path):
    server.pause = 60
    files = remote(server.url, tmp_path, shards=1)
    process = FORK.Process(daemon=True, target=files.path, args=(SHARDS[0],))
    process.start()
    wait_until(lambda: any(name.endswith(".part") and size for name, size in held(tmp_path).items()))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.pause = 0
    assert files.path(next_name).read_bytes() == content(
        next_name
    )  # the one that was killed, or another one that needs its room
    assert held(tmp_path) == {next_name: SHARD}


def test_a_connection_that_drops_half_way_twice_is_tried_again(server, tmp_path):
    server.drops[f"/store/{SHARDS[0]}"] = 2
    assert remote(server.url, tmp_path).path(SHARDS[0]).read_bytes() == content(SHARDS[0])
    assert server.gets(SHARDS[0]) == 3


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_connection_that_always_drops_is_one_line_and_no_file(tells_length, server, tmp_path):
    server.drops[f"/store/{SHARDS[0]}"], server.tells_length = 9, tells_length
    with pytest.raises(InputError, match=f"{server.url}/{SHARDS[0]}: can't be fetched .*tried 4 times") as caught:
        remote(server.url, tmp_path).path(SHARDS[0])
    assert "\n" not in str(caught.value)
    assert server.gets(SHARDS[0]) == 4
    assert held(tmp_path) == {}


def test_a_server_that_says_no_size_is_believed_and_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_size", lambda url, name: None)
    files = remote(server.url, tmp_path, shards=2)
    for name in SHARDS[:4]:
        assert files.path(name).read_bytes() == content(name)
    assert held(tmp_path) == dict.fromkeys(SHARDS[2:4], SHARD)


@pytest.mark.parametrize(
    ("status", "says"), [(403, "no permission; give the credentials that http://"), (404, "no such file; check")]
)
def test_what_the_server_keeps_back_is_one_line_at_once(status, says, server, tmp_path):
    server.status[f"/store/{SHARDS[0]}"] = status
    files = remote(server.url, tmp_path)
    assert not files.exists(SHARDS[0])
    server.asked.clear()
    with pytest.raises(MissingFileError, match=f"{SHARDS[0]}: {says}"):
        files.path(SHARDS[0])
    assert server.asked.total() == 1


def test_a_server_in_trouble_is_tried_again_also_when_asked_whether_a_file_exists(server, tmp_path):
    server.status[f"/store/{SHARDS[0]}"] = 503
    with pytest.raises(InputError, match=r"503.*tried 4 times"):
        remote(server.url, tmp_path).exists(SHARDS[0])
    assert server.asked.total() == 4


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://no-such-host.invalid/store", r"no-such-host.invalid/store/store.json: can't be fetched .*host"),
        ("http://127.0.0.1:9/store", r"127.0.0.1:9/store/store.json: can't be fetched .*tried 4 times"),
        (
            "lacking://bucket/store",
            r"lacking://bucket/store: .* takes the package no_such_package; install it \(pip install no_such_package\)",
        ),
        ("nonsense://bucket/store", r"nonsense://bucket/store: Protocol not known: nonsense; give a folder, or a URL"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(url, says, server, tmp_path):
    fsspec.register_implementation("lacking", "no_such_package.FileSystem", errtxt="Install it", clobber=True)
    for ask in (RemoteFiles.path, RemoteFiles.exists):
        with pytest.raises(InputError, match=says) as caught:
            ask(remote(url, tmp_path), "store.json")
        assert "\n" not in str(caught.value)


def test_a_shard_that_the_cache_can_not_hold_is_refused_with_what_it_takes(url, tmp_path):
    files = RemoteFiles(url, tmp_path / "cache", SHARD - 1)
    files.pin("v1")
    files.path("store.json")
    with pytest.raises(
        InputError,
        match=r"may hold 0.05 MB, but 00000.safetensors takes 0.05 MB beside 1.2e-05 MB of small files; allow",
    ):
        files.path(SHARDS[0])


def test_a_full_disk_is_told_as_such(server, tmp_path):
    def fetch():
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, SHARD // 2))
        try:
            remote(server.url, tmp_path).path(SHARDS[0])
        except OSError as error:
            return str(error)

    assert "File too large" in in_fork(fetch)
    assert held(tmp_path) == {}


def test_a_prefetched_file_takes_no_further_request(server, tmp_path):
    files = remote(server.url, tmp_path)
    files.prefetch(SHARDS[:6])
    wait_until(lambda: held(tmp_path) == dict.fromkeys(SHARDS[:6], SHARD))
    assert server.gets(SHARDS[6]) == 0
    server.shutdown()
    for name in SHARDS[:6]:
        assert files.path(name).read_bytes() == content(name)


def test_a_prefetch_forgets_what_the_last_one_still_waited_for(server, tmp_path):
    server.pause = 0.2
    files = remote(server.url, tmp_path)
    files.prefetch(SHARDS[:6])
    wait_until(lambda: server.fetched.total() == 2)
    files.prefetch(SHARDS[6:8])
    wait_until(lambda: len([name for name in held(tmp_path) if name in SHARDS]) == 4)
    assert [name for name in SHARDS if server.gets(name)] == [*SHARDS[:2], *SHARDS[6:8]]


def test_a_failed_prefetch_is_told_when_the_file_is_asked_for(server, tmp_path):
    files = remote(server.url, tmp_path)
    server.status[f"/store/{SHARDS[0]}"] = 403
    files.prefetch(SHARDS[:2])
    wait_until(lambda: SHARDS[1] in held(tmp_path))
    with pytest.raises(MissingFileError, match="no permission"):
        files.path(SHARDS[0])
    remote("nonsense://store", tmp_path).prefetch(SHARDS)


def test_a_prefetch_takes_the_room_of_what_is_not_coming_and_never_of_what_was_just_asked_for(server, tmp_path):
    files = remote(server.url, tmp_path, shards=3)
    for name in SHARDS[:3]:
        files.path(name)
        time.sleep(0.01)
    files.prefetch([SHARDS[0], SHARDS[3]])  # 0 is coming, 2 was just asked for
    wait_until(lambda: SHARDS[3] in held(tmp_path))
    assert sorted(held(tmp_path)) == [SHARDS[0], SHARDS[2], SHARDS[3]]
    small = remote(server.url, tmp_path / "small", shards=1)
    asked = small.path(SHARDS[0])
    small.prefetch([SHARDS[1]])
    wait_until(lambda: small._prefetcher._threads == 0)
    assert asked.exists()


def test_a_prefetch_fills_the_cache_with_what_comes_first_and_stops(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "PREFETCH_THREADS", 1)  # two may overtake each other by one file
    files = remote(server.url, tmp_path, shards=3)
    for _ in range(3):
        files.prefetch(SHARDS[:8])
        wait_until(lambda: files._prefetcher._threads == 0)
        assert sorted(held(tmp_path)) == SHARDS[:3]
    assert server.fetched.total() == 3
    assert server.asked.total() < 10  # the first that finds no room is the last to try
    server.files[f"/other/{SHARDS[0]}"] = content(SHARDS[0])
    other = remote(server.url.replace("store", "other"), tmp_path, shards=3)  # of the same process
    other.prefetch(SHARDS[:1])
    wait_until(lambda: other._prefetcher._threads == 0)
    assert server.fetched.total() == 3
    files.path(SHARDS[8])  # asked for: takes the room of what comes last
    assert sorted(held(tmp_path)) == [*SHARDS[:2], SHARDS[8]]


class Reading(Dataset):
    """Shards' first bytes, as loader workers read them."""

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
    files.prefetch(
        SHARDS[:2]
    )  # on their way, over the parent's connections and under its locks, when the workers are forked
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
