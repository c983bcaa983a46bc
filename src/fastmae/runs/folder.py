"""A run on disk: what it is, its checkpoint, its logs.

RUN/run.json                what the run is: options, store, encoder; together with the weights, all that `knn` needs
RUN/inputs.json             where its stores were last found; they may move
RUN/checkpoint.pt           the last checkpoint
RUN/best.pt                 the weights of the best evaluation, if the task has a metric
RUN/metrics.jsonl           one line per log entry
RUN/evaluations.jsonl       one line per evaluation
RUN/tensorboard/            the same, for TensorBoard
RUN/replaced-1/ ...         what --no-resume set aside
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fastmae.errors import InputError
from fastmae.outside.documents import read_json
from fastmae.runs.description import WAY_OUT, check_description
from fastmae.runtime.durable import holds_anything, remove_parts, write_json, write_whole

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.pt"
BEST_FILE = "best.pt"
INPUTS_FILE = "inputs.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
FILES = (CHECKPOINT_FILE, BEST_FILE, METRICS_FILE, EVALUATIONS_FILE, TENSORBOARD_FOLDER, RUN_FILE)
"""A run's files in the order in which they are set aside: run.json last, since a folder without it is no run."""


class RunFolder:
    """Opens a run's folder, new or begun.

    Args:
        path: the folder.
        description: what the run is, JSON-able; must equal the description of a run that was begun here.
        resume: False sets an earlier run's files aside, into replaced-N.

    Raises:
        InputError: the folder holds another run, or something else.
    """

    def __init__(self, path: Path, description: dict[str, Any], resume: bool):
        self.path, self.description = path, description
        if path.exists() and (not path.is_dir() or (holds_anything(path) and not (path / RUN_FILE).exists())):
            raise InputError(f"{path}: exists and is not a run; give a new or an empty folder")
        if path.exists():
            remove_parts(path)
        if (path / RUN_FILE).exists() and not resume:
            self._set_aside()
        if (path / RUN_FILE).exists():
            differences = _differences(read_run(path), json.loads(json.dumps(description)))
            if differences:
                raise InputError(
                    f"{path}: holds a run with other settings (it has {'; '.join(differences)}); give the same "
                    "settings, another folder, or, to a training command, --no-resume"
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / RUN_FILE, description)

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint."""
        return self.path / CHECKPOINT_FILE

    @property
    def best(self) -> Path:
        """Path of the best weights."""
        return self.path / BEST_FILE

    def metrics(self, step: int) -> "MetricsLog":
        """The log, without entries after a step."""
        return MetricsLog(self.path, step)

    def _set_aside(self) -> None:
        number = 1
        while (self.path / f"replaced-{number}").exists():
            number += 1
        replaced = self.path / f"replaced-{number}"
        replaced.mkdir()
        for name in FILES:
            if (self.path / name).exists():
                (self.path / name).rename(replaced / name)


class MetricsLog:
    """metrics.jsonl, evaluations.jsonl and TensorBoard.

    Args:
        run: the run's folder.
        step: entries after it, from a killed call, are dropped.
    """

    def __init__(self, run: Path, step: int):
        self.run = run
        for name in (METRICS_FILE, EVALUATIONS_FILE):
            lines = [line for line in _complete_lines(run / name) if json.loads(line)["step"] <= step]
            if lines or (run / name).exists() or name == METRICS_FILE:
                write_whole(run / name, partial(Path.write_text, data="".join(lines), encoding="utf-8"))
        self.board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a log entry. JSON has no infinity (which a gradient norm may be), so that becomes null."""
        self._write(METRICS_FILE, step, values)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Add the figures of an evaluation."""
        self._write(EVALUATIONS_FILE, step, values)

    def _write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        entry = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self.board.close()


def read_run(path: Path) -> dict[str, Any]:
    """A run's description.

    Raises:
        InputError: not a run's folder, or a damaged description.
    """
    file = path / RUN_FILE
    if not file.is_file():
        raise InputError(f"{path}: not a run's folder (no {RUN_FILE} in it); make one with `fastmae pretrain`")
    return check_description(read_json(file, way_out=WAY_OUT), file)


def read_inputs(path: Path) -> dict[str, Any]:
    """Where a run's inputs were when it last trained; empty if that is not known."""
    file = path / INPUTS_FILE
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's metrics.jsonl, in their order."""
    return [json.loads(line) for line in _complete_lines(path / METRICS_FILE)]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's evaluations.jsonl, in their order."""
    return [json.loads(line) for line in _complete_lines(path / EVALUATIONS_FILE)]


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file, without an incomplete last one that a kill may have left."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    differences: list[str] = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += _differences(old, new, f"{prefix}{key} ")
        elif old != new:
            name = f"--{key.replace('_', '-')}" if prefix == "options " else f"{prefix}{key}"
            differences.append(f"{name} {_shortened(old)}, not {_shortened(new)}")
    return differences


def _shortened(value: Any) -> str:
    """A value for a message: of a digest, the first digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
