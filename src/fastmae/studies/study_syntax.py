"""How a study file is read: plain values, options of commands, names and paths. Each error says where it is."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmae.config import FinetuneConfig, PretrainConfig, TokenizeConfig
from fastmae.config.resolve import CALLER_ONLY, near
from fastmae.config.teacher import refuse_code
from fastmae.errors import InputError
from fastmae.outside import documents
from fastmae.tokens.files import is_url

EVERYWHERE = ("seed", "device", "workers", *CALLER_ONLY)
"""Options that the study sets for all its commands."""
SET_BY_STUDY = {
    PretrainConfig: (*EVERYWHERE, "stores", "run", "devices", "resume", "profile", "knn_every", "knn_data", "teacher"),
    TokenizeConfig: (*EVERYWHERE, "images", "store", "rank", "world_size", "add", "dry_run"),
    FinetuneConfig: (*EVERYWHERE, "run", "data", "out", "devices", "resume", "pretrained", "weights"),
}
PAIRS = re.compile(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""")
"""Parts of a text between commas, but for those within brackets or quotes."""


def read_study(path: Path, source: str, known: str) -> dict[str, Any]:
    """The file's values.

    Raises:
        InputError: it does not exist, is not YAML, or holds something else.
        OSError: it can't be read.
    """
    try:
        values = documents.read_yaml(path, way_out="see docs/studies.md")
    except FileNotFoundError:
        raise InputError(f"{source}: does not exist; give a study file, or one of {known}") from None
    if not isinstance(values, dict):
        raise InputError(f"{source}: not a study; it needs `arms:`, see docs/studies.md")
    for key in ("tokenize", "teachers", "data"):
        _refuse_code_in(values.get(key), f"{source}: {key}")
    return values


def _refuse_code_in(values: Any, where: str) -> None:
    """Refuse code that a study file names anywhere below a key. On the command line, `--teacher` may name some."""
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    for part in parts:
        _refuse_code_in(part, where)
    refuse_code(values, where, "--teacher")


def options_of(entry: Any, kind: Any, where: str) -> dict[str, Any]:
    """Options of a command, by their fields' names. Their values are checked when the command's options are built.

    Raises:
        InputError: no such option, or one that the study sets.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: give options, as `{{name: value}}`, not {entry!r}")
    named = {str(key).replace("-", "_"): value for key, value in entry.items()}
    known = [name for name in kind.__dataclass_fields__ if name not in SET_BY_STUDY[kind]]
    for name in named:
        if name in SET_BY_STUDY[kind]:
            raise InputError(f"{where}: {name}: is set by the study; leave it out")
        if name not in known:
            raise InputError(f"{where}: no option '{name}'{near(name, known)}")
    return named


def mapping_of(values: Mapping[str, Any], key: str, source: str) -> dict[Any, Any]:
    """The entries below a key, by their names; none if the file lacks the key.

    Raises:
        InputError: something else than names and entries.
    """
    entry = values.get(key)
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise InputError(f"{source}: {key}: give `name: ...` lines")
    wrong = next((name for name in entry if isinstance(name, bool) or name is None), None)
    if wrong is not None or None in entry:
        raise InputError(f"{source}: {key}: YAML reads a name as {wrong}; put it in quotes")
    return entry


def check_keys(entry: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse a key that has no meaning.

    Raises:
        InputError: names the key and the nearest one that is known.
    """
    for key in entry:
        if key not in known:
            all_keys = f"; keys: {', '.join(known)}"
            raise InputError(f"{where}: no key '{key}'{near(key, known) or all_keys}")


def as_file_name(text: str) -> str:
    """A name as that of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def check_folder_names(names: Sequence[str], where: str) -> None:
    """Check that names can have folders, and different ones.

    Raises:
        InputError: two would share one, or a name is no folder's.
    """
    folders = [as_file_name(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        if not folder.strip("."):
            raise InputError(f"{where}: '{name}' can't be the name of a folder; rename it")
        if folders.count(folder) > 1:
            raise InputError(f"{where}: '{name}' and another one differ only in signs; rename one")


def tokenize_options(entry: Any, where: str, path: Path) -> dict[str, Any]:
    """Options of tokenize, with the paths that a study file names relative to it.

    Raises:
        InputError: no such option, or one that the study sets.
    """
    options = options_of(entry, TokenizeConfig, where)
    if options.get("teacher_weights") is not None:
        options["teacher_weights"] = beside(path, str(options["teacher_weights"]))
    kind, _, name = str(options.get("teacher", "")).partition("/")
    if kind in ("file", "hf") and (path.parent / name).exists():
        options["teacher"] = f"{kind}/{beside(path, name)}"
    return options


def pretrain_options(entry: Any, where: str, path: Path) -> dict[str, Any]:
    """Options of pretrain, likewise."""
    options = options_of(entry, PretrainConfig, where)
    if "init" in options:
        options["init"] = _weights_beside(path, options["init"])
    return options


def choices_of(entry: Any, where: str, path: Path) -> dict[str, list[Any]]:
    """Options of pretrain, each with the values to choose from.

    Raises:
        InputError: something else, or an option that makes another run than a setting does.
    """
    choices: dict[str, list[Any]] = {}
    for option, values in options_of(entry, PretrainConfig, where).items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: {option}: give a list of values to choose from")
        if option == "target":
            raise InputError(f"{where}: target: what is predicted can't be tuned; give each an arm of its own")
        choices[option] = [_weights_beside(path, value) for value in values] if option == "init" else values
    return choices


def _weights_beside(path: Path, init: Any) -> Any:
    """`--init`, as an absolute path if it names a file beside the study."""
    return beside(path, str(init)) if init and (path.parent / str(init)).exists() else init


def pairs(text: str, flag: str) -> dict[str, Any]:
    """`flip=false,betas=[0.9,0.95]` as options; a comma within brackets or quotes belongs to its value.

    Raises:
        InputError: not such pairs.
    """
    values = {}
    parts = [part for part in PAIRS.findall(text) if part.strip()]
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{flag} {part}: give options as name=value, separated by commas")
        values[name.strip().replace("-", "_")] = documents.parse_yaml(
            value, name=f"{flag} {part}", way_out="give options as name=value, separated by commas"
        )
    return values


def beside(path: Path, value: str) -> str:
    """A path that a file names, relative to that file, as an absolute one; a URL as it is."""
    return value if is_url(value) else str((path.parent / Path(value).expanduser()).absolute())
