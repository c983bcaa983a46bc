import json

import pytest

from fastmae.errors import InputError
from fastmae.runs.folder import RunFolder, read_evaluations, read_metrics, read_run

DESCRIPTION = {"options": {"epochs": 3, "betas": (0.9, 0.95)}, "photos": {"train": 10}}


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
        log.write(step, {"loss": float(step)})
        log.write_evaluation(step, {"top1": 10.0 * step})
    log.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    folder.metrics(2).close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2]
    assert json.loads(metrics.read_text().splitlines()[0]) == {"step": 1, "loss": 1.0}
    assert read_evaluations(tmp_path / "run") == [{"step": 1, "top1": 10.0}, {"step": 2, "top1": 20.0}]


def test_what_a_killed_call_left_half_written_is_removed(tmp_path, abandoned_part):
    run = tmp_path / "run"
    run.mkdir()
    (run / abandoned_part("run.json")).write_text("{")
    RunFolder(run, DESCRIPTION, resume=True)
    (run / abandoned_part("checkpoint.pt")).write_bytes(b"half")
    RunFolder(run, DESCRIPTION, resume=True)
    assert [path.name for path in run.iterdir()] == ["run.json"]
