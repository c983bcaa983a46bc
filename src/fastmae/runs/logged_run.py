"""A run as a logger sees it, and RUN/loggers.json: the ids under which other services know it."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from fastmae.errors import InputError, first_line
from fastmae.images.decode import open_image
from fastmae.outside.documents import read_json
from fastmae.runtime.durable import write_json

log = logging.getLogger(__name__)

LOGGERS_FILE = "loggers.json"


@dataclass(frozen=True)
class LoggedRun:
    """What a logger may want to know of a run.

    Attributes:
        folder: the run's.
        task: name of the command.
        options: those that make the run what it is.
        step: the run goes on after it. What was logged of later steps is void.
        entries: the run's log up to that step, in its order.
    """

    folder: Path
    task: str
    options: Mapping[str, Any]
    step: int
    entries: Sequence[Mapping[str, float | None]]


def decoded(png: bytes) -> Image.Image:
    """A picture that a run has drawn, from its PNG file."""
    return open_image(io.BytesIO(png)).convert("RGB")


class LoggerIds(msgspec.Struct, frozen=True):
    """A run's ids; empty where a service does not know it.

    Attributes:
        wandb: of Weights & Biases.
        mlflow: of MLflow.
    """

    wandb: str = ""
    mlflow: str = ""


def read_ids(run: Path) -> LoggerIds:
    """The ids of a run. A file that can't be read says nothing: the run is then logged as a new one."""
    try:
        ids: LoggerIds = read_json(run / LOGGERS_FILE, LoggerIds, way_out="the run is logged under new ids")
    except FileNotFoundError:
        return LoggerIds()
    except (InputError, OSError) as error:
        log.warning(first_line(error))
        return LoggerIds()
    return ids


def keep_ids(run: Path, **ids: str) -> None:
    """Note the id that a service has given."""
    write_json(run / LOGGERS_FILE, msgspec.to_builtins(msgspec.structs.replace(read_ids(run), **ids)))
