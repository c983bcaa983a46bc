"""Who owns a folder: the first process, until it ends, is gone, or has been silent for too long."""

import json
import os
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from fastmae.errors import InputError
from fastmae.runtime import ownership
from fastmae.runtime.durable import holds_anything, write_new, write_whole
from fastmae.runtime.ownership import Owner, Record, check_owner, owned, owned_place

pytestmark = pytest.mark.promise("owner")
NO_PROCESS = 4194304  # Linux's process numbers are smaller


@pytest.fixture
def fast(monkeypatch):
    """Signs of life every 20 ms; silent after 0.3 s."""
    for name, seconds in (("BEAT", 0.02), ("POLL", 0.01), ("PATIENCE", 0.3)):
        monkeypatch.setattr(ownership, name, seconds)


@pytest.fixture
def lock(tmp_path):
    return tmp_path / ".owner.lock"


def leave_lock(path, token="a" * 32, **changes):
    """The lock of a process that is gone."""
    fields = {
        "token": token,
        "host": "node7",
        "machine": ownership._machine(),
        "pid": NO_PROCESS,
        "born": 1,
        "since": "2026-01-02 03:04:05",
        "command": "fastmae pretrain",
        **changes,
    }
    path.write_bytes(msgspec.json.encode(Record(**fields)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_made_and_owned_and_the_lock_goes_with_the_owner(tmp_path):
    folder = tmp_path / "runs" / "run"
    with owned(folder, "pretrain"):
        assert names(folder) == [".owner.lock"]
        assert not holds_anything(folder)
        record = json.loads((folder / ".owner.lock").read_text())
        assert (record["pid"], record["command"]) == (os.getpid(), "fastmae pretrain")
        (folder / "run.json").write_text("{}")
    assert names(folder) == ["run.json"]


def test_a_call_that_writes_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="no images"), owned(tmp_path / "runs" / "run", "pretrain"):
        raise InputError("no images")
    assert names(tmp_path) == []


def test_a_second_owner_is_refused_with_the_first_ones_process_and_the_way_out(tmp_path, lock):
    with owned(tmp_path, "pretrain"):
        with pytest.raises(InputError) as refused, owned(tmp_path, "pretrain"):
            pass
        line = str(refused.value)
        assert line.startswith(f"{tmp_path}: in use by process {os.getpid()} on ")
        assert "(fastmae pretrain) since 20" in line
        assert line.endswith(f"if there is no such process, delete {lock}")
        assert names(tmp_path) == [".owner.lock"]


def test_the_shares_of_a_work_have_owners_of_their_own(tmp_path):
    with owned(tmp_path, "tokenize", "0-of-2"), owned(tmp_path, "tokenize", "1-of-2"):
        assert names(tmp_path) == [".owner.0-of-2.lock", ".owner.1-of-2.lock"]


def test_the_lock_of_a_file_or_folder_that_is_renamed_to_its_place_lies_beside_it(tmp_path):
    out = tmp_path / "exports" / "out"
    with owned_place(out, "export"):
        assert names(out.parent) == [".owner.out.lock"]
        with pytest.raises(InputError, match="in use"), owned_place(out, "export"):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("changes", [{}, {"pid": os.getpid()}, {"pid": os.getppid()}], ids=["gone", "own", "reused"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(changes, tmp_path, lock, caplog):
    leave_lock(lock, **changes)
    with owned(tmp_path, "pretrain"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert names(tmp_path) == [".owner.lock"]
    pid = changes.get("pid", NO_PROCESS)
    line = f"{tmp_path}: process {pid} on node7 (fastmae pretrain) is gone; this process takes its place"
    assert caplog.messages == [line]


def test_a_claim_of_a_process_that_died_while_it_took_over_is_taken_over_too(tmp_path, lock):
    leave_lock(lock)
    leave_lock(tmp_path / f".owner.lock.{'a' * 32}.claim", token="b" * 32)
    with owned(tmp_path, "pretrain"):
        assert names(tmp_path) == [".owner.lock"]


def test_a_lock_that_is_being_taken_over_is_left_to_the_process_that_came_first(tmp_path, lock):
    leave_lock(lock)
    leave_lock(tmp_path / f".owner.lock.{'a' * 32}.claim", "b" * 32, pid=os.getppid(), born=None)
    with pytest.raises(InputError, match=f"in use by process {os.getppid()} "), owned(tmp_path, "pretrain"):
        pass


@pytest.mark.usefixtures("fast")
def test_the_owner_on_another_machine_is_awaited_until_it_gives_a_sign_of_life(tmp_path, lock, monkeypatch, caplog):
    with owned(tmp_path, "pretrain"):
        monkeypatch.setattr(ownership, "_machine", lambda: "another machine")
        with pytest.raises(InputError, match="in use by process"), owned(tmp_path, "pretrain"):
            pass
    assert "waiting for a sign of its life" in caplog.text


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("content", ["record", "not one"])
def test_the_owner_on_another_machine_is_gone_after_a_long_silence(content, tmp_path, lock, caplog):
    leave_lock(lock, machine="another machine")
    if content != "record":
        lock.write_bytes(b"\x00" * 50)
    start = time.monotonic()
    with owned(tmp_path, "pretrain"):
        assert time.monotonic() - start > 0.2
    assert "takes its place" in caplog.text


def test_silence_is_measured_by_the_clock_of_the_disk(tmp_path, lock, monkeypatch):
    leave_lock(lock, machine="another machine")
    touched = lock.stat().st_mtime - ownership.PATIENCE - 1
    os.utime(lock, (touched, touched))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with owned(tmp_path, "pretrain"):  # at once
        pass


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_of_many_that_find_a_lock_left_behind_one_takes_it_over(has_hard_links, tmp_path, lock, monkeypatch):
    def link(source, place):
        raise OSError(1, "Operation not permitted")

    if not has_hard_links:
        monkeypatch.setattr(os, "link", link)
    for _ in range(20):
        leave_lock(lock)
        taken, refused, start = [], [], threading.Barrier(8)

        def take(taken=taken, refused=refused, start=start):
            start.wait()
            try:
                taken.append(Owner(tmp_path, lock, "pretrain"))
            except InputError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(taken), len(refused)) == (1, 7), refused
        assert names(tmp_path) == [".owner.lock"]
        taken[0].release()
        assert names(tmp_path) == []


def test_an_owner_that_lost_its_folder_writes_nothing_more_and_leaves_the_new_ones_lock(tmp_path, lock):
    with owned(tmp_path, "pretrain"):
        write_whole(tmp_path / "a", lambda part: part.write_text("mine"))
        leave_lock(lock)
        for write in (lambda: write_whole(tmp_path / "a", lambda part: part.write_text("late")), add_new(tmp_path)):
            with pytest.raises(InputError, match=r"process 4194304 on node7 .* has taken it over"):
                write()
        check_owner(tmp_path.parent / "elsewhere")
    assert (tmp_path / "a").read_text() == "mine"
    assert names(tmp_path) == [".owner.lock", "a"]


def add_new(folder):
    return lambda: write_new(folder / "b", b"late")


def test_an_owner_whose_lock_was_deleted_by_hand_stops(tmp_path, lock):
    with owned(tmp_path, "pretrain"):
        lock.unlink()
        with pytest.raises(InputError, match="was removed"):
            check_owner(tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_nobodys(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the user of the tests may be allowed everything
    with owned(tmp_path, "tokenize"):
        assert names(tmp_path) == []


def test_a_killed_process_leaves_its_lock_and_the_next_one_takes_it_over(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from fastmae.runtime.ownership import owned
with owned(Path({str(tmp_path)!r}), "pretrain"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as killed:
        while killed.poll() is None and not holds_lock(tmp_path):
            time.sleep(0.01)
        killed.wait()
    assert holds_lock(tmp_path)
    with owned(tmp_path, "pretrain"):
        pass
    assert names(tmp_path) == []


def holds_lock(folder):
    return (folder / ".owner.lock").exists()
