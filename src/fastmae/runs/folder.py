"""A run on disk: what it was asked for, its checkpoint, its metrics.

RUN/run.json                what the run is: options, store, encoder (`fastmae knn RUN` needs nothing else but weights)
RUN/inputs.json             where its stores were found last; they may move
RUN/checkpoint.pt           the last checkpoint, whole or not there; read with weights_only
RUN/best.pt                 the weights of the best evaluation, where the task names a figure
RUN/metrics.jsonl           a line a log entry
RUN/evaluations.jsonl       a line an evaluation
RUN/tensorboard/            the same, for TensorBoard
RUN/replaced-1/ ...         what --no-resume set aside
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fastmae.errors import InputError
from fastmae.runtime.durable import holds_anything, remove_parts, write_json, write_whole

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.pt"
BEST_FILE = "best.pt"
INPUTS_FILE = "inputs.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
FILES = (CHECKPOINT_FILE, BEST_FILE, METRICS_FILE, EVALUATIONS_FILE, TENSORBOARD_FOLDER, RUN_FILE)
"""All of a run's; run.json last: a folder without it is no run."""


class RunFolder:
    """Opens a run's folder, new or begun.

    Args:
        path: the folder.
        description: what the run is, JSON-able; must equal that of a begun run.
        resume: False sets an earlier run's files aside, into replaced-N.

    Raises:
        InputError: the folder holds another run, or something else.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], resume: bool):
        self.path = path
        if path.exists() and (not path.is_dir() or (holds_anything(path) and not (path / RUN_FILE).exists())):
            raise InputError(f"{path}: exists and is not a run; give a folder that is new or empty")
        if path.exists():
            remove_parts(path)
        if (path / RUN_FILE).exists() and not resume:
            self._set_aside()
        if (path / RUN_FILE).exists():
            differing = _differences(read_run(path), json.loads(json.dumps(description)))
            if differing:
                raise InputError(
                    f"{path}: holds a run with other settings ({'; '.join(differing)}); give them again, another folder, or --no-resume"
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / RUN_FILE, description)

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is, or will be."""
        return self.path / CHECKPOINT_FILE

    @property
    def best(self) -> Path:
        """Where the best weights are, or will be."""
        return self.path / BEST_FILE

    def metrics(self, step: int) -> "MetricsLog":
        """The log, cut back to what was written up to a step."""
        return MetricsLog(self.path, step)

    def _set_aside(self) -> None:
        number = 1
        while (self.path / f"replaced-{number}").exists():
            number += 1
        aside = self.path / f"replaced-{number}"
        aside.mkdir()
        for name in (
            CHECKPOINT_FILE,
            BEST_FILE,
            METRICS_FILE,
            EVALUATIONS_FILE,
            TENSORBOARD_FOLDER,
            RUN_FILE,
        ):  # run.json last: without it, no run
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)


class MetricsLog:
    """metrics.jsonl, evaluations.jsonl and TensorBoard.

    Args:
        run: the run's folder.
        step: entries after it (of a killed call) are dropped.
    """

    def __init__(self, run: Path, step: int):
        self.run = run
        for name in (METRICS_FILE, EVALUATIONS_FILE):
            kept = [line for line in _whole_lines(run / name) if json.loads(line)["step"] <= step]
            if kept or (run / name).exists() or name == METRICS_FILE:
                write_whole(run / name, lambda aside, kept=kept: aside.write_text("".join(kept), encoding="utf-8"))  # type: ignore[misc]
        self.board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add what a step gave; JSON has no word for infinity (a gradient's norm, while its scale is being found), so that is null."""
        self._write(METRICS_FILE, step, values)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Add what an evaluation after a step gave."""
        self._write(EVALUATIONS_FILE, step, values)

    def _write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        entry = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush both."""
        self.board.close()


def read_run(path: Path) -> dict[str, Any]:
    """What a run's folder says that it is.

    Raises:
        InputError: not a run's folder.
    """
    file = path / RUN_FILE
    if not file.is_file():
        raise InputError(f"{path}: not a run's folder (no {RUN_FILE} in it); make one with `fastmae pretrain`")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: can't be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a run's description")
    return value


def read_inputs(path: Path) -> dict[str, Any]:
    """Where a run's inputs were when it trained last; empty where that is not known."""
    file = path / INPUTS_FILE
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in _whole_lines(path / METRICS_FILE)]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's evaluations.jsonl, in order."""
    return [json.loads(line) for line in _whole_lines(path / EVALUATIONS_FILE)]


def _whole_lines(path: Path) -> list[str]:
    """A kill may leave half a line at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key} ")
        elif a != b:
            found.append(f"{prefix}{key}: {a}, not {b}")
    return found
