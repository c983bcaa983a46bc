import json
import os

import pytest

from fastmae.errors import InputError
from fastmae.runs.folder import RunFolder, read_evaluations, read_inputs, read_metrics, read_run

LOGGED = {"epoch": 0.5, "lr": 0.1, "seconds": 2.0, "images_per_second": 9.5}
DESCRIPTION = {"task": "pretrain", "options": {"epochs": 3, "betas": (0.9, 0.95)}, "photos": {"train": 10}}


def test_a_run_can_only_be_opened_again_with_the_same_description(tmp_path):
    RunFolder(tmp_path / "run", DESCRIPTION, resume=True)
    RunFolder(tmp_path / "run", DESCRIPTION, resume=True)
    with pytest.raises(InputError, match="--epochs 3, not 4"):
        RunFolder(tmp_path / "run", {**DESCRIPTION, "options": {"epochs": 4, "betas": (0.9, 0.95)}}, resume=True)
    assert read_run(tmp_path / "run")["photos"] == {"train": 10}


def test_no_resume_sets_the_old_run_aside_and_deletes_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run", DESCRIPTION, resume=True)
    folder.checkpoint.write_bytes(b"hours of work")
    other = RunFolder(tmp_path / "run", {"options": {}}, resume=False)
    assert not other.checkpoint.exists()
    assert (tmp_path / "run" / "replaced-1" / "checkpoint.pt").read_bytes() == b"hours of work"
    RunFolder(tmp_path / "run", {"options": {}}, resume=False)
    assert (tmp_path / "run" / "replaced-2" / "run.json").exists()


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=str(tmp_path)):
        RunFolder(tmp_path, DESCRIPTION, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_entries_after_the_checkpoint_and_an_incomplete_line_are_dropped_from_the_logs(tmp_path):
    folder = RunFolder(tmp_path / "run", DESCRIPTION, resume=True)
    log = folder.metrics(0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), **LOGGED})
        log.write_evaluation(step, {"top1": 10.0 * step, "epoch": 1.0, "seconds": 2.0})
    log.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    folder.metrics(2).close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2]
    assert json.loads(metrics.read_text().splitlines()[0]) == {"step": 1, "loss": 1.0, **LOGGED}
    assert [entry["top1"] for entry in read_evaluations(tmp_path / "run")] == [10.0, 20.0]


def test_what_a_killed_call_left_half_written_is_removed(tmp_path, abandoned_part):
    run = tmp_path / "run"
    run.mkdir()
    (run / abandoned_part("run.json")).write_text("{")
    RunFolder(run, DESCRIPTION, resume=True)
    (run / abandoned_part("checkpoint.pt")).write_bytes(b"half")
    RunFolder(run, DESCRIPTION, resume=True)
    assert [path.name for path in run.iterdir()] == ["run.json"]


UNREADABLE = {
    "not JSON": "\x00\x00",
    "cut off by a full disk": '{"step": 2, "lo{"step": 3}',
    "nested": '{"step": ' + 100_000 * "[" + "}",
    "of another type": '{"step": "2", "loss": 1, "epoch": 1, "lr": 1, "seconds": 1, "images_per_second": 1}',
    "without the values that every entry has": '{"step": 2}',
    "a list": "[1, 2]",
    "not UTF-8": "{\udcff}",
}


@pytest.mark.promise("files")
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("line", UNREADABLE.values(), ids=UNREADABLE)
def test_a_line_of_a_log_that_cannot_be_read_stops_no_run_and_costs_no_other_line(name, line, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run", DESCRIPTION, resume=True)
    entries = [{"step": step, "loss": 1 / 3, **LOGGED} for step in (1, 5, 9)]
    good = [json.dumps(entry) + "\n" for entry in entries]
    log = tmp_path / "run" / name
    damaged = "".join([good[0], line + "\n", *good[1:]]).encode(errors="surrogateescape")
    log.write_bytes(damaged)
    read = read_metrics if name == "metrics.jsonl" else read_evaluations
    assert read(tmp_path / "run") == entries
    folder.metrics(8).close()
    assert log.read_text() == good[0] + good[1]
    assert (tmp_path / "run" / f"{name}.damaged-1").read_bytes() == damaged
    assert caplog.messages == [
        f"{log}: 1 line can't be read, and left out",
        f"{log}: 1 line can't be read; the log as it was is kept as {name}.damaged-1, and goes on without them",
    ]


@pytest.mark.promise("files")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a link to itself"])
def test_what_is_no_log_is_set_aside_and_the_run_goes_on(kind, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run", DESCRIPTION, resume=True)
    log = tmp_path / "run" / "metrics.jsonl"
    make = {"a named pipe": os.mkfifo, "a folder": os.mkdir, "a link to itself": lambda path: path.symlink_to(path)}
    make[kind](log)
    folder.metrics(0).close()
    assert read_metrics(tmp_path / "run") == []
    assert log.is_file()
    assert os.path.lexists(tmp_path / "run" / "metrics.jsonl.damaged-1")
    assert str(log) in caplog.text
    assert "the run goes on with a new log" in caplog.text


@pytest.mark.promise("files")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["{", "[1]", '{"stores": 3}', '{"stores": [[]]}', 100_000 * "[", None])
def test_inputs_that_cannot_be_read_are_unknown(text, tmp_path, caplog):
    file = tmp_path / "inputs.json"
    os.mkfifo(file) if text is None else file.write_text(text)
    assert read_inputs(tmp_path).stores == []
    assert str(file) in caplog.text
    caplog.clear()
    file.unlink()
    assert read_inputs(tmp_path).stores == []
    assert caplog.text == ""
