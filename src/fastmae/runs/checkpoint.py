"""Checkpoint files: written whole or not at all, read without running code from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastmae.errors import InputError, first_line
from fastmae.runtime.durable import write_whole


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


def write_checkpoint(path: Path, held: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OSError: a full disk, say.
    """

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            try:
                torch.save(held, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_whole(path, write)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a run, and not another project's; its tensors are not read."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # another kind of file, or an older one of torch's, which can't be mapped: not ours
        return False
    return isinstance(value, dict) and "model" in value and "run" in value
