"""A run on disk: what it is, its checkpoint, its logs.

RUN/run.json                what the run is: options, store, encoder; together with the weights, all that `knn` needs
RUN/inputs.json             where its stores were last found; they may move
RUN/checkpoint.pt           the last checkpoint
RUN/best.pt                 the weights of the best evaluation, if the task has a metric
RUN/metrics.jsonl           one line per log entry
RUN/evaluations.jsonl       one line per evaluation
RUN/tensorboard/            the same, for TensorBoard; metrics.csv and wandb/ likewise, if --logger asks for them
RUN/loggers.json            the ids under which other loggers know the run
RUN/replaced-1/ ...         what --no-resume set aside
RUN/LOG.damaged-1 ...       a log as it was, of which some or all lines can't be read; the run has gone on without them
"""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fastmae.errors import InputError, first_line
from fastmae.outside.documents import read_json, read_json_lines
from fastmae.runs.description import WAY_OUT, check_description
from fastmae.runs.logged_run import LOGGERS_FILE, LoggedRun
from fastmae.runs.loggers import CSV_FILE, TENSORBOARD_FOLDER, Loggers
from fastmae.runtime.durable import holds_anything, remove_parts, write_json, write_whole
from fastmae.runtime.ownership import check_owner
from fastmae.runtime.wording import counted

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.pt"
BEST_FILE = "best.pt"
INPUTS_FILE = "inputs.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
PICTURES_DUE_FILE = ".pictures-due"
WANDB_FOLDER = "wandb"
FILES = (
    *(CHECKPOINT_FILE, BEST_FILE, METRICS_FILE, EVALUATIONS_FILE, PICTURES_DUE_FILE),
    *(TENSORBOARD_FOLDER, CSV_FILE, WANDB_FOLDER, LOGGERS_FILE, RUN_FILE),
)
"""A run's files in the order in which they are set aside: run.json last, since a folder without it is no run."""
LARGEST_LOG = 1 << 28
"""Most bytes of a log: a million entries."""
ALWAYS_LOGGED = {
    METRICS_FILE: ("epoch", "loss", "lr", "seconds", "images_per_second"),
    EVALUATIONS_FILE: ("epoch", "seconds"),
}
"""What every entry of a log has besides its step, as numbers."""
Entry = dict[str, Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | float | None]
"""A line of a log. None stands for a number that is infinite, which JSON doesn't have."""


class Inputs(msgspec.Struct):
    """Where a run's inputs were when it last trained.

    Attributes:
        stores: of a pre-training run; empty if that is not known.
    """

    stores: list[str] = []


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

    @property
    def pictures_due(self) -> Path:
        """Path of a file that is there while the pictures of an evaluation in the log are still to be drawn."""
        return self.path / PICTURES_DUE_FILE

    def metrics(self, step: int, loggers: Sequence[str] = ()) -> "MetricsLog":
        """The log, without entries after a step; and the loggers that get the same."""
        return MetricsLog(self.path, step, loggers, self.description)

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
    """metrics.jsonl and evaluations.jsonl, and the loggers that get the same figures.

    A log that can't be read, or some of whose lines can't, stops no run: it is set aside, and goes on with the rest.

    Args:
        run: the run's folder.
        step: entries after it, from a killed call, are dropped.
        loggers: names, as in `--logger`.
        description: what the run is.
    """

    def __init__(self, run: Path, step: int, loggers: Sequence[str], description: Mapping[str, Any]):
        self.run = run
        kept: list[dict[str, Any]] = []
        for name in (METRICS_FILE, EVALUATIONS_FILE):
            entries = _readable_entries(run / name)
            if entries or (run / name).exists() or name == METRICS_FILE:
                before = [entry for entry in entries if entry["step"] <= step]
                text = "".join(json.dumps(entry) + "\n" for entry in before)
                write_whole(run / name, partial(Path.write_text, data=text, encoding="utf-8"))
                kept += before
        kept.sort(key=lambda entry: entry["step"])
        logged = LoggedRun(run, description.get("task", ""), description.get("options", {}), step, kept)
        self.loggers = Loggers(loggers, logged)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a log entry. JSON has no infinity (which a gradient norm may be), so that becomes null."""
        self._write(METRICS_FILE, step, values)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Add the figures of an evaluation."""
        self._write(EVALUATIONS_FILE, step, values)

    def _write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        check_owner(self.run / name)
        entry = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        self.loggers.scalars(step, values)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Give a picture to the loggers. `png`: the bytes of its file."""
        self.loggers.picture(step, name, png)

    def close(self, ended_well: bool = True) -> None:
        """Close the loggers. `ended_well`: whether the call was neither interrupted nor failed."""
        self.loggers.close(ended_well)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(ended_well=kind is None)


def read_run(path: Path) -> dict[str, Any]:
    """A run's description.

    Raises:
        InputError: not a run's folder, or a damaged description.
    """
    file = path / RUN_FILE
    if not file.is_file():
        raise InputError(f"{path}: not a run's folder (no {RUN_FILE} in it); make one with `fastmae pretrain`")
    return check_description(read_json(file, way_out=WAY_OUT), file)


def read_inputs(path: Path) -> Inputs:
    """Where a run's inputs were when it last trained. A file that can't be read says nothing."""
    file = path / INPUTS_FILE
    try:
        inputs: Inputs = read_json(file, Inputs, way_out="taken as if it were not there")
    except FileNotFoundError:
        return Inputs()
    except (InputError, OSError) as error:
        log.warning(first_line(error))
        return Inputs()
    return inputs


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's metrics.jsonl, in their order. Lines that can't be read are left out, with a warning.

    Raises:
        InputError: not a file, or a larger one than any log.
        OSError: it can't be read.
    """
    return _read_log(path / METRICS_FILE)


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's evaluations.jsonl, as `read_metrics`."""
    return _read_log(path / EVALUATIONS_FILE)


def _read_log(path: Path) -> list[dict[str, Any]]:
    entries, unreadable = _entries(path)
    if unreadable:
        log.warning(f"{path}: {counted(unreadable, 'line')} can't be read, and left out")
    return entries


def _entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    """A log's entries, and the number of its lines that are none. Both are empty if there is no log."""
    try:
        lines, unreadable = read_json_lines(path, Entry, limit=LARGEST_LOG)
    except FileNotFoundError:
        return [], 0
    entries = [
        entry
        for entry in lines
        if isinstance(entry.get("step"), int) and all(entry.get(key) is not None for key in ALWAYS_LOGGED[path.name])
    ]
    return entries, unreadable + len(lines) - len(entries)


def _readable_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of the log of a run that goes on. If there is more in it, the file is kept under another name."""
    damaged = next(
        name for number in itertools.count(1) if not (name := path.with_name(f"{path.name}.damaged-{number}")).exists()
    )
    try:
        entries, unreadable = _entries(path)
    except (InputError, OSError) as error:
        path.rename(damaged)
        log.warning(f"{first_line(error)}; it was set aside as {damaged.name}, and the run goes on with a new log")
        return []
    if unreadable:
        write_whole(damaged, partial(shutil.copyfile, path))
        log.warning(
            f"{path}: {counted(unreadable, 'line')} can't be read; the log as it was is kept as {damaged.name}, and "
            "goes on without them"
        )
    return entries


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
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
