"""Checkpoint files: written whole or not at all, and read without running code from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastmae.errors import InputError, first_line
from fastmae.runtime.durable import write_whole


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into the CPU's memory.

    Raises:
        InputError: no checkpoint there, or a damaged one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint; the run has not saved one yet")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict) or "model" not in value or "run" not in value:
            raise ValueError("not a fastmae checkpoint")
    except Exception as error:  # a damaged archive, a pickle with code, other contents
        raise InputError(f"{path}: damaged, or not a checkpoint of fastmae ({first_line(error)})") from error
    return value


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
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # another kind of file, or an old checkpoint that can't be mapped: not ours
        return False
    return isinstance(value, dict) and "model" in value and "run" in value
