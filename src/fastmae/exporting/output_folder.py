"""The folder of an export: built aside, put in its place when it is complete and checked; an earlier export of the same is replaced."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmae.errors import InputError
from fastmae.runtime.durable import write_json

EXPORT_FILE = "fastmae.json"
"""Says what a folder is an export of. The last file to appear in it."""


def check_place(out: Path, identity: dict[str, Any]) -> None:
    """Whether an export may go to a folder.

    Args:
        out: the folder.
        identity: what makes two exports the same one, out of what `EXPORT_FILE` says.

    Raises:
        InputError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    earlier = read_export(out) if out.is_dir() else {}
    if not earlier:
        raise InputError(f"{out}: exists and is not an export; give a folder that is new or empty")
    differing = [
        f"{name}: {earlier.get(name)}, not {value}" for name, value in identity.items() if earlier.get(name) != value
    ]
    if differing:
        raise InputError(
            f"{out}: holds another export ({'; '.join(differing)}); give another folder, or delete this one"
        )


def read_export(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself; {} where it is none, or unreadable."""
    try:
        value = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def put_whole(out: Path, description: dict[str, Any]) -> Iterator[Path]:
    """A folder to write to, which takes the place of `out` where all goes well; else `out` stays as it was.

    Of an earlier export only its own files are replaced or removed: what else lies there (the hub's .git, say) stays.

    Args:
        out: the folder to appear.
        description: goes into `EXPORT_FILE`, with the list of files.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(
        f".{out.name}.exporting"
    )  # of one name, so that what a kill leaves of it goes with the next call
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        _flush(aside)
        files = sorted(path.name for path in aside.iterdir())
        write_json(aside / EXPORT_FILE, {**description, "files": files})
        if out.exists() and any(out.iterdir()):
            _replace(out, aside, files)
        else:
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(out: Path, aside: Path, files: list[str]) -> None:
    earlier = read_export(out).get("files", [])
    for name in files:
        (aside / name).replace(out / name)
    for name in set(earlier) - set(files):
        if Path(name).name == name:
            (out / name).unlink(missing_ok=True)
    (aside / EXPORT_FILE).replace(out / EXPORT_FILE)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(folder.stat().st_mode & 0o666)  # some writers make files that only their owner may read
