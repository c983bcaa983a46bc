"""Where a run's figures and pictures are shown besides its own log: TensorBoard, a CSV file, Weights & Biases, MLflow.

metrics.jsonl stays what a run goes by. A logger that fails costs one warning: the run goes on without it.
"""

import csv
import importlib.util
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from fastmae.errors import InputError, first_line
from fastmae.runs.logged_run import LoggedRun, decoded
from fastmae.runs.mlflow_logger import MlflowLogger
from fastmae.runs.wandb_logger import WandbLogger
from fastmae.runtime.durable import write_whole

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
CSV_FILE = "metrics.csv"
PACKAGES = ("wandb", "mlflow")
"""Loggers that need a package of the same name, which an extra of the same name installs."""


class RunLogger(Protocol):
    """Where a run's figures and pictures go. All of it may raise anything."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture of a step, as a PNG file."""

    def close(self, ended_well: bool) -> None:
        """Send what is left. `ended_well`: whether the call was neither interrupted nor failed."""


class TensorBoardLogger:
    """TensorBoard, in the run's folder. It shows nothing of what a killed call logged after the last checkpoint."""

    def __init__(self, run: LoggedRun):
        self.board = SummaryWriter(str(run.folder / TENSORBOARD_FOLDER), purge_step=run.step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One curve for each figure."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Under Images."""
        self.board.add_image(name, np.asarray(decoded(png)), step, dataformats="HWC")

    def close(self, ended_well: bool) -> None:
        """Flush its file."""
        self.board.close()


class CsvLogger:
    """RUN/metrics.csv: a row for each entry of the run's two logs, in the order of the steps.

    It is made anew from the logs when a run continues, so that it holds all of them from the first step on.
    """

    def __init__(self, run: LoggedRun):
        self.path = run.folder / CSV_FILE
        self.rows = [dict(entry) for entry in run.entries]
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        self._write_anew()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A row at the end; with new columns, the whole file."""
        row: dict[str, float | None] = {"step": step, **values}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._write_anew()
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A table has no place for pictures. They lie in the run's folder."""

    def close(self, ended_well: bool) -> None:
        """Every row is written already."""

    def _write_anew(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, partial(Path.write_bytes, data=text.getvalue().encode()))


KINDS: dict[str, Callable[[LoggedRun], RunLogger]] = {
    "tensorboard": TensorBoardLogger,
    "csv": CsvLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}
"""Name in `--logger` -> the logger."""


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        InputError: one is missing.
    """
    for name in names:
        found = importlib.util.find_spec(name) if name in PACKAGES else None
        # Without the package, a folder of its name in the working directory, such as wandb makes, would be found.
        if name in PACKAGES and (found is None or found.origin is None):
            raise InputError(f"--logger {name}: needs {name}; pip install 'fastmae[{name}]'")


class Loggers:
    """The loggers of a run. One that fails is dropped, with a warning.

    Args:
        names: of `KINDS`.
        run: the run.
    """

    def __init__(self, names: Sequence[str], run: LoggedRun):
        self.open: dict[str, RunLogger] = {}
        for name in names:
            self._attempt(name, partial(self._open, name, run))

    def _open(self, name: str, run: LoggedRun) -> None:
        self.open[name] = KINDS[name](run)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, for each logger."""
        for name, logger in list(self.open.items()):
            self._attempt(name, partial(logger.scalars, step, values))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture of a step, for each logger."""
        for logger_name, logger in list(self.open.items()):
            self._attempt(logger_name, partial(logger.picture, step, name, png))

    def close(self, ended_well: bool) -> None:
        """Close each logger."""
        for name, logger in list(self.open.items()):
            self._attempt(name, partial(logger.close, ended_well))

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # of a library, a server or a disk; none of them is worth a run
            self.open.pop(name, None)
            log.warning(f"--logger {name}: failed ({first_line(error)}); the run goes on without it")
