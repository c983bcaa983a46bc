"""Weights & Biases, offline: its local run folder holds what would be sent."""

import json
import os
import sys
import time

import pytest
import wandb

from fastmae.cli import run
from fastmae.runs.logged_run import LoggedRun
from fastmae.runs.loggers import Loggers

BLOCK = 32768


@pytest.fixture(autouse=True)
def offline():
    """No network, no login, and none of the machine's own settings. The logger sets variables, too."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    wandb.setup()  # a program may have used the package before
    os.environ["WANDB_MODE"] = "offline"
    yield
    os.environ.clear()
    os.environ.update(before)


def records(folder):
    """The records in the files of finished offline runs, in their order: (file, kind, message).

    A process of wandb's own writes them, up to a record of the run's end.
    """
    deadline, files = time.monotonic() + 60, len(list(folder.glob("wandb/offline-run-*")))
    while [kind for _, kind, _ in written_records(folder)].count("exit") < files and time.monotonic() < deadline:
        time.sleep(0.1)
    return list(written_records(folder))


def written_records(folder):
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:  # a block's last bytes hold no header
                at += BLOCK - at % BLOCK
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                parts = b""
                yield file, record.WhichOneof("record_type"), record


def figures(folder):
    """What each history record holds, its step among it."""
    found = []
    for _, kind, record in records(folder):
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({"step": record.history.step.num} | {k: v for k, v in items.items() if not k.startswith("_")})
    return found


def test_a_run_is_logged_under_its_folders_name_and_nothing_of_the_machine_is(vit_store, tiny_student, tmp_path):
    out = tmp_path / "my-run"
    args = ["pretrain", str(vit_store), str(out), *tiny_student, "--workers", "0", "--epochs", "1"]
    assert run([*args, "--logger", "wandb"]) == 0
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert figures(out) == entries
    described = next(record.run for _, kind, record in records(out) if kind == "run")
    assert (described.display_name, described.project, described.job_type) == ("my-run", "fastmae", "pretrain")
    assert described.run_id == json.loads((out / "loggers.json").read_text())["wandb"]
    options = {item.key: item.value_json for item in described.config.update}
    assert options["encoder"] == '"vit_tiny_patch16_224"'
    kinds = {kind for _, kind, _ in records(out)}
    assert not kinds & {"stats", "output", "output_raw", "environment"}
    assert not described.host
    assert not [path.name for path in out.glob("wandb/offline-run-*/files/*")]


def test_a_continued_run_keeps_its_id_and_a_run_that_starts_over_gets_a_new_one(vit_store, tiny_student, tmp_path):
    out = tmp_path / "run"
    args = ["pretrain", str(vit_store), str(out), *tiny_student, "--workers", "0", "--epochs", "1", "--logger", "wandb"]
    assert run(args) == 0
    first = json.loads((out / "loggers.json").read_text())["wandb"]
    assert run(args) == 0
    assert {record.run.run_id for _, kind, record in records(out) if kind == "run"} == {first}
    assert run([*args, "--no-resume"]) == 0
    assert json.loads((out / "loggers.json").read_text())["wandb"] != first
    assert len(figures(out)) == len(figures(out / "replaced-1"))


def test_pictures_and_evaluations_are_logged(tmp_path, png):
    loggers = Loggers(["wandb"], LoggedRun(tmp_path, "linear", {}, 0, ()))
    loggers.scalars(3, {"top1": 50.0})
    loggers.picture(3, "confusion", png)
    loggers.close(ended_well=True)
    (entry,) = figures(tmp_path)
    assert (entry["step"], entry["top1"], entry["confusion/_type"]) == (3, 50.0, "image-file")
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 1


def test_without_a_login_the_run_goes_on_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "stdin", None)
    loggers = Loggers(["wandb"], LoggedRun(tmp_path, "linear", {}, 0, ()))
    loggers.scalars(1, {"loss": 1.0})
    loggers.close(ended_well=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "wandb login" in warnings[0]
