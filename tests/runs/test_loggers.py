"""Where a run's figures go besides its own log: TensorBoard, a CSV file, and what happens when a logger fails."""

import csv
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.runs import loggers as loggers_module
from fastmae.runs.folder import read_evaluations, read_metrics
from fastmae.runs.logged_run import LoggedRun
from fastmae.runs.loggers import KINDS, Loggers, check_installed


def logged(folder, step=0, entries=()):
    return LoggedRun(folder, "pretrain", {"epochs": 2.0, "encoder": "vit_tiny"}, step, entries)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)], events.Tags()["images"]


def test_every_logger_gets_the_figures_under_the_names_of_the_runs_own_log(vit_store, tiny_student, tmp_path):
    out = tmp_path / "run"
    args = ["pretrain", str(vit_store), str(out), *tiny_student, "--workers", "0", "--epochs", "1", "--knn-every", "1"]
    assert run([*args, "--logger", "tensorboard,csv"]) == 0
    entries = read_metrics(out) + read_evaluations(out)
    assert sorted(rows(out), key=len) == sorted(entries, key=len)
    for name in ("loss", "grad_norm", "knn_top1"):
        assert scalars(out, name)[0] == [entry["step"] for entry in entries if name in entry]
    assert "logger" not in json.loads((out / "run.json").read_text())["options"]
    # Another choice continues the same run; the new file holds all of it.
    (out / "metrics.csv").unlink()
    assert run([*args, "--logger", "csv"]) == 0
    assert sorted(rows(out), key=len) == sorted(entries, key=len)


def test_without_loggers_a_run_has_its_own_log_alone(vit_store, tiny_student, tmp_path):
    out = tmp_path / "run"
    args = ["pretrain", str(vit_store), str(out), *tiny_student, "--workers", "0", "--epochs", "1", "--logger", "none"]
    assert run(args) == 0
    assert {path.name for path in out.iterdir()} == {"run.json", "inputs.json", "metrics.jsonl", "checkpoint.pt"}


def test_a_continued_run_has_each_step_once(tmp_path, png):
    first = Loggers(["tensorboard", "csv"], logged(tmp_path))
    for step in (1, 2, 3):
        first.scalars(step, {"loss": 1 / step})
    first.close(ended_well=False)
    kept = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    second = Loggers(["tensorboard", "csv"], logged(tmp_path, 2, kept))
    second.scalars(3, {"loss": 1 / 3})
    second.scalars(3, {"accuracy": 50.0})
    second.picture(3, "confusion", png)
    second.close(ended_well=True)
    assert rows(tmp_path) == [*kept, {"step": 3, "loss": 1 / 3}, {"step": 3, "accuracy": 50.0}]
    assert scalars(tmp_path, "loss") == ([1, 2, 3], ["confusion"])


def test_pictures_of_an_evaluation_reach_the_loggers(tiny_run, photos, tmp_path):
    out = tmp_path / "linear"
    assert run(["linear", str(tiny_run), str(photos), "--out", str(out), *"--epochs 1 --workers 0".split()]) == 0
    assert (out / "confusion.png").exists()
    assert scalars(out, "loss")[1] == ["confusion"]


def test_a_logger_that_fails_costs_one_warning_and_nothing_else(tmp_path, monkeypatch, caplog):
    class Failing:
        def __init__(self, run):
            pass

        def scalars(self, step, values):
            raise ConnectionError("no route to host\nand more")

    monkeypatch.setitem(KINDS, "wandb", Failing)
    loggers = Loggers(["wandb", "csv"], logged(tmp_path))
    loggers.scalars(1, {"loss": 1.0})
    loggers.scalars(2, {"loss": 0.5})
    loggers.close(ended_well=True)
    assert [entry["loss"] for entry in rows(tmp_path)] == [1.0, 0.5]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["--logger wandb: failed (no route to host); the run goes on without it"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_with_the_line_that_installs_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"pip install 'fastmae\[{name}\]'"):
        check_installed(["csv", name])
    monkeypatch.undo()
    (tmp_path / name).mkdir()  # as wandb leaves one in the working directory
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(InputError, match=f"--logger {name}"):
        check_installed([name])


@pytest.mark.parametrize(
    ("value", "named"), [("tensorbord", "did you mean 'tensorboard'?"), ("none,csv", "none stands alone"), ("", "give")]
)
def test_a_logger_that_there_is_not_is_refused(value, named, tmp_path, error_line):
    line = error_line(["pretrain", "store", str(tmp_path / "run"), f"--logger={value}"])
    assert "--logger" in line
    assert named in line
    assert not list(tmp_path.iterdir())
