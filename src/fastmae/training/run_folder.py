"""A run on disk: what it was asked for, its checkpoint, its metrics.

RUN/run.json                what the run is: options, store, encoder (`fastmae knn RUN` needs nothing else but weights)
RUN/checkpoint.pt           the last checkpoint, whole or not there; read with weights_only
RUN/metrics.jsonl           a line a log entry
RUN/tensorboard/            the same, for TensorBoard
RUN/replaced-1/ ...         what --no-resume set aside
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from fastmae.durable import holds_anything, remove_parts, write_json, write_whole
from fastmae.errors import InputError, first_line

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.pt"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


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

    def metrics(self, step: int) -> "MetricsLog":
        """The log, cut back to what was written up to a step."""
        return MetricsLog(self.path, step)

    def _set_aside(self) -> None:
        number = 1
        while (self.path / f"replaced-{number}").exists():
            number += 1
        aside = self.path / f"replaced-{number}"
        aside.mkdir()
        for name in (CHECKPOINT_FILE, METRICS_FILE, TENSORBOARD_FOLDER, RUN_FILE):  # run.json last: without it, no run
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)


class MetricsLog:
    """metrics.jsonl and TensorBoard, one entry for both.

    Args:
        run: the run's folder.
        step: entries after it (of a killed call) are dropped.
    """

    def __init__(self, run: Path, step: int):
        self.path = run / METRICS_FILE
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
        write_whole(self.path, lambda aside: aside.write_text("".join(kept), encoding="utf-8"))
        self.board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add an entry for a step; JSON has no word for infinity (a gradient's norm, while its scale is being found), so that is null."""
        entry = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in _whole_lines(path / METRICS_FILE)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, to the CPU, without running code from it.

    Raises:
        InputError: no checkpoint there, or a damaged one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint; the run has not saved one yet")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict) or "model" not in value or "run" not in value:
            raise ValueError("not a fastmae checkpoint")
    except Exception as error:  # damaged zip, pickle with code, wrong contents
        raise InputError(f"{path}: damaged, or not a checkpoint of fastmae ({first_line(error)})") from error
    return value


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
