"""Checkpoint files: written whole or not at all, and read without running code from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from fastmae.errors import InputError
from fastmae.outside.documents import checked
from fastmae.outside.tensors import check_finite, opened, read_tensors
from fastmae.runs.description import WAY_OUT, check_description
from fastmae.runtime.durable import write_whole

Count = Annotated[int, msgspec.Meta(ge=0)]


class Checkpoint(msgspec.Struct):
    """What a checkpoint holds besides tensors; what a run needs to continue may be missing (as in `best.pt`)."""

    run: dict[str, Any]
    step: Count = 0
    seconds: float = 0.0
    sums: dict[str, float] = {}
    summed_steps: Count = 0
    best: float = 0.0
    optimizer: dict[str, Any] = {}
    precision: dict[str, Any] = {}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into the CPU's memory, and check what all commands rely on.

    Raises:
        InputError: no checkpoint there, or a damaged one.
    """
    if not path.exists():
        raise InputError(f"{path}: no checkpoint; the run has not saved one yet")
    value = read_tensors(path)
    if not _is_of_a_run(value):
        raise InputError(f"{path}: not a checkpoint of fastmae; give a run's folder, or its checkpoint.pt")
    checked(value, Checkpoint, name=path, way_out=WAY_OUT)
    check_description(value["run"], path)
    for part in ("model", "ema"):
        weights = value.get(part, {})
        if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
        ):
            raise InputError(f"{path}: its '{part}' holds other things than weights; {WAY_OUT}")
        check_finite(weights, path)
    return value


def load_to_continue(path: Path, with_ema: bool) -> dict[str, Any]:
    """As `load_checkpoint`, for a run that trains on from it.

    Raises:
        InputError: as `load_checkpoint`, or a part is missing.
    """
    saved = load_checkpoint(path)
    parts = [part.name for part in msgspec.structs.fields(Checkpoint)] + (["ema"] if with_ema else [])
    missing = [part for part in parts if part not in saved]
    if missing:
        raise InputError(
            f"{path}: holds no {missing[0]}, so the run can't continue from it; --no-resume starts anew, and sets this "
            "run aside"
        )
    return saved


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OSError: a full disk, say.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch hides a full disk behind an error of its own
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_whole(path, write)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a run, rather than of another project. Its tensors are not read."""
    try:
        with opened(path) as (value, _):
            return _is_of_a_run(value)
    except InputError:  # another kind of file: not ours
        return False


def _is_of_a_run(value: Any) -> bool:
    return isinstance(value, dict) and "model" in value and "run" in value
