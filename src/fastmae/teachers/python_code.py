"""python/MODULE:FUNCTION -> the torch module that this code of the user's own builds.

This is the one place where code that is not ours is imported, and only for a name that the user gave, on the command
line or in Python. A name that a file holds does not get here: see `config.teacher` and `factory.teacher_of_store`.
"""

import importlib
import importlib.util
import sys
import traceback
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastmae.config.teacher import PYTHON, GivenTeacher
from fastmae.errors import InputError, first_line, is_out_of_memory

PACKAGE = Path(__file__).parents[1]
SHOWN_NAMES = 8
"""Names in a module that a message lists."""


def built_module(spec: str) -> tuple[nn.Module, str | None]:
    """Run the user's code.

    Args:
        spec: `python/MODULE:FUNCTION`, `python/PATH.py:FUNCTION`, or a `GivenTeacher`. MODULE is looked up on sys.path
            and in the working folder. FUNCTION is a function or a class without arguments, or a torch module.

    Returns:
        The torch module, and the file of the code where that is known. A module that a caller gave is copied, so that
        the caller's own stays in its mode and on its device.

    Raises:
        InputError: no such code, code that fails, or it builds something else.
    """
    if isinstance(spec, GivenTeacher):
        kind = type(spec.given) if isinstance(spec.given, nn.Module) else spec.given
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        built = _copied(spec) if isinstance(spec.given, nn.Module) else _called(spec.given, spec, file)
    else:
        place, _, name = spec.removeprefix(PYTHON).rpartition(":")
        if not place or not name:
            raise InputError(f"{spec}: give python/MODULE:FUNCTION, or python/PATH.py:FUNCTION")
        module = _imported(place, spec)
        file = module.__file__
        found = _attribute(module, name, spec)
        built = found if isinstance(found, nn.Module) else _called(found, spec, file)
    if not isinstance(built, nn.Module):
        raise InputError(f"{spec}: returns {kind_of(built)}; return a torch module")
    return built, file


def described(error: BaseException, file: str | None) -> str:
    """What code of the user's own raised, and the innermost place in its file: `KeyError: 'x', tissue.py:12`."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not Path(frame.filename).is_relative_to(PACKAGE)
    ]
    own = [frame for frame in frames if frame.filename == file] or frames
    place = f", {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def kind_of(value: Any) -> str:
    """A value in a message: `a tuple`, or `a tensor [2, 197, 384]`."""
    if isinstance(value, torch.Tensor):
        kind = "a tensor" if value.is_floating_point() else f"a tensor of {str(value.dtype).removeprefix('torch.')}"
        return f"{kind} {list(value.shape)}"
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _imported(place: str, spec: str) -> ModuleType:
    """The module of a name or of a path. Its folder, or the working folder, is from then on the last of sys.path."""
    path = Path(place).expanduser().absolute()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise InputError(f"{spec}: there is no file {path}; give python/PATH.py:FUNCTION")
    if not is_file and not all(part.isidentifier() for part in place.split(".")):
        raise InputError(f"{spec}: '{place}' is no name of a module; give python/MODULE:FUNCTION")
    folder = path.parent if is_file else Path.cwd()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: a file beside the images must not take the place of an installed package
    importlib.invalidate_caches()  # in a notebook, the file may have been written a moment ago
    try:
        return _from_file(path) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}.") and not is_file:
            raise InputError(
                f"{spec}: there is no module {error.name}, neither installed nor in {folder}; give its name without "
                ".py, or python/PATH.py:FUNCTION"
            ) from error
        raise InputError(f"{spec}: {place} imports {error.name}, which is not there; install it") from error
    except SyntaxError as error:  # its text says where
        raise InputError(f"{spec}: {place} can't be imported ({type(error).__name__}: {first_line(error)})") from error
    except (Exception, SystemExit) as error:  # SystemExit: a script that parses a command line
        raise InputError(f"{spec}: {place} can't be imported ({described(error, None)})") from error


def _from_file(path: Path) -> ModuleType:
    """A module from its file. The same file is run once."""
    name = f"fastmae_teacher_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # as for any path that ends in .py
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    """What a name stands for in a module."""
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [
                other
                for other, value in vars(module).items()
                if callable(value) and getattr(value, "__module__", None) == module.__name__
            ]
            there = f"it has {', '.join(own[:SHOWN_NAMES])}" if own else "it has no functions of its own"
            raise InputError(f"{spec}: {module.__file__ or module.__name__} has no '{name}'; {there}")
        found = getattr(found, part)
    return found


def _called(function: Any, spec: str, file: str | None) -> Any:
    """What the user's function returns."""
    if not callable(function):
        raise InputError(f"{spec}: is {kind_of(function)}; name a function that returns a torch module")
    try:
        return function()
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{spec}: fails ({described(error, file)}); it is called without arguments") from error


def _copied(spec: GivenTeacher) -> nn.Module:
    try:
        copy: nn.Module = deepcopy(spec.given)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{spec}: can't be copied ({type(error).__name__}: {first_line(error)}); give a function that returns it"
        ) from error
    return copy
