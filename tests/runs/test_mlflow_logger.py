"""MLflow, with a database in a file."""

import json
import os

import pytest

from fastmae.cli import run
from fastmae.runs.logged_run import LoggedRun
from fastmae.runs.loggers import Loggers

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """A client of the database that the logger writes to. The logger sets variables, too."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)  # the pictures of a database go to ./mlruns
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    os.environ.update(MLFLOW_TRACKING_URI=uri, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="WARNING")
    os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)
    yield mlflow.MlflowClient(uri)
    os.environ.clear()
    os.environ.update(before)


def id_of(folder):
    return json.loads((folder / "loggers.json").read_text())["mlflow"]


def history(client, run_id, name):
    return sorted((entry.step, entry.value) for entry in client.get_metric_history(run_id, name))


def test_a_run_is_logged_under_its_folders_name_with_its_options(vit_store, tiny_student, tmp_path, client):
    out = tmp_path / "my-run"
    args = ["pretrain", str(vit_store), str(out), *tiny_student, "--workers", "0", "--epochs", "1"]
    assert run([*args, "--logger", "mlflow"]) == 0
    logged = client.get_run(id_of(out))
    assert logged.info.run_name == "my-run"
    assert logged.info.status == "FINISHED"
    assert client.get_experiment(logged.info.experiment_id).name == "fastmae"
    assert logged.data.params["encoder"] == "vit_tiny_patch16_224"
    assert logged.data.params["task"] == "pretrain"
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in set(entries[0]) - {"step"}:
        assert history(client, id_of(out), name) == [(entry["step"], entry[name]) for entry in entries]


def test_a_continued_run_goes_on_as_the_same_run_with_each_step_once(tmp_path, client, png):
    first = Loggers(["mlflow"], LoggedRun(tmp_path, "finetune", {}, 0, ()))
    for step in (1, 2, 3):
        first.scalars(step, {"loss": 1 / step, "epoch": step})
    first.close(ended_well=False)
    run_id = id_of(tmp_path)
    assert client.get_run(run_id).info.status == "KILLED"
    second = Loggers(["mlflow"], LoggedRun(tmp_path, "finetune", {}, 1, ()))
    assert client.get_run(run_id).info.status == "RUNNING"
    for step in (2, 3, 4):
        second.scalars(step, {"loss": 1 / step, "epoch": step})
    second.scalars(4, {"top1": 50.0, "epoch": 4})
    second.picture(4, "confusion", png)
    second.close(ended_well=True)
    assert id_of(tmp_path) == run_id
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert history(client, run_id, "epoch") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(client, run_id, "top1") == [(4, 50.0)]
    assert [file.path for file in client.list_artifacts(run_id, "images") if "confusion" in file.path]


def test_a_run_that_the_server_does_not_know_is_logged_as_a_new_one(tmp_path, client):
    (tmp_path / "loggers.json").write_text('{"wandb": "", "mlflow": "0123456789abcdef0123456789abcdef"}')
    loggers = Loggers(["mlflow"], LoggedRun(tmp_path, "pretrain", {}, 0, ()))
    loggers.scalars(1, {"loss": 1.0})
    loggers.close(ended_well=True)
    assert history(client, id_of(tmp_path), "loss") == [(1, 1.0)]


def test_a_server_that_does_not_answer_costs_one_warning(tmp_path, caplog):
    os.environ.update(MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    loggers = Loggers(["mlflow"], LoggedRun(tmp_path, "pretrain", {}, 0, ()))
    loggers.scalars(1, {"loss": 1.0})
    loggers.close(ended_well=True)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("fastmae")]
    assert len(warnings) == 1
    assert "--logger mlflow: failed" in warnings[0]
