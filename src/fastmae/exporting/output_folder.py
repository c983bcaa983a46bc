"""The folder of an export: built aside, put in place when complete, in place of an earlier export of the same model."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastmae.errors import InputError
from fastmae.outside.documents import checked, read_json
from fastmae.runtime.cards import EXPORT_FILE
from fastmae.runtime.durable import remove_parts, write_json
from fastmae.runtime.ownership import check_owner


def check_output_folder(out: Path, identity: dict[str, Any]) -> None:
    """Check that an export may be written to a folder: new, empty, or an earlier export of the same model.

    Args:
        out: the folder.
        identity: the entries of `EXPORT_FILE` that must match for an earlier export to be replaced.

    Raises:
        InputError: the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    earlier = read_export(out) if out.is_dir() else {}
    if not earlier:
        raise InputError(f"{out}: exists and is not an export; give a folder that is new or empty")
    differences = [
        f"{name}: {earlier.get(name)}, not {value}" for name, value in identity.items() if earlier.get(name) != value
    ]
    if differences:
        raise InputError(
            f"{out}: holds another export ({'; '.join(differences)}); give another folder, or delete this one"
        )


def read_export(folder: Path) -> dict[str, Any]:
    """The description in an exported folder; {} if the folder is not an export or can't be read."""
    file, way_out = folder / EXPORT_FILE, "export again"
    try:
        description: dict[str, Any] = read_json(file, dict[str, Any], way_out=way_out)
        checked(description.get("files"), list[str], name=file, way_out=way_out)
    except (OSError, InputError):
        return {}
    return description


@contextlib.contextmanager
def complete_folder(out: Path, description: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder to write to. It replaces `out` on success; on any error `out` stays as it was.

    Only the files of an earlier export are replaced or removed. Other files in `out` stay (the hub's .git, say).

    Args:
        out: the folder to create or replace.
        description: the content of `EXPORT_FILE`; the list of files is added.

    Raises:
        OSError: a full disk, say; it names `out`.
    """
    shown, out = out, out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(out.parent)
    # The name is fixed, so that the next call removes what a killed call left behind.
    temporary = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        files = sorted(path.name for path in temporary.iterdir())
        write_json(temporary / EXPORT_FILE, {**description, "files": files})
        check_owner(out)
        if out.exists() and any(out.iterdir()):
            _replace_files(out, temporary, files)
        else:
            temporary.rename(out)
    except OSError as error:  # which names a file in the temporary folder, or none
        cause = error.strerror or f"{error} (is the disk full?)"  # numpy does not say
        raise OSError(error.errno, cause, str(shown)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the weights file of an export.

    Raises:
        OSError: a full disk, say. safetensors' own writer would hide it behind an error of its own.
    """
    path.write_bytes(safetensors.torch.save(dict(weights), metadata={"format": "pt"}))


def write_pth(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a weights file for libraries that read no safetensors: plain tensors, which `weights_only=True` loads."""
    with path.open("wb") as file:
        torch.save({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, file)


def _replace_files(out: Path, temporary: Path, files: list[str]) -> None:
    earlier_files = read_export(out).get("files", [])
    for name in files:
        (temporary / name).replace(out / name)
    for name in set(earlier_files) - set(files):
        if Path(name).name == name:  # an edited list must not reach files outside the folder
            (out / name).unlink(missing_ok=True)
    (temporary / EXPORT_FILE).replace(out / EXPORT_FILE)


def _flush(folder: Path) -> None:
    """Flush the files to the disk, and let everybody read them who may read the folder.

    Some libraries write files that only their owner may read.
    """
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(folder.stat().st_mode & 0o666)
