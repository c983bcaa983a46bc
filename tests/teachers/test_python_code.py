"""python/MODULE:FUNCTION: where the code is found, and what is said about code that can't be used."""

import sys
import threading
from pathlib import Path

import pytest
from torch import nn

from fastmae.config.teacher import GivenTeacher
from fastmae.errors import InputError
from fastmae.teachers.python_code import built_module

GOOD = "from torch import nn\n\nclass Net(nn.Identity):\n    pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, which sys.path does not hold, as for the installed command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_in_the_working_folder_may_import_its_neighbours(folder):
    (folder / "neighbour_of_it.py").write_text(GOOD)
    (folder / "own_teacher.py").write_text("from neighbour_of_it import Net\n\ndef build():\n    return Net()\n")
    module, file = built_module("python/own_teacher:build")
    assert (type(module).__name__, file) == ("Net", str(folder / "own_teacher.py"))


@pytest.mark.parametrize("place", ["./models/net.py", "models/net.py", "models.net"])
def test_code_is_found_by_a_path_and_in_a_package(place, folder):
    (folder / "models").mkdir()
    (folder / "models" / "net.py").write_text(GOOD)
    assert type(built_module(f"python/{place}:Net")[0]).__name__ == "Net"


def test_a_file_is_run_once_for_both_of_its_functions(folder):
    (folder / "net.py").write_text(f"open('runs', 'a').write('x')\n{GOOD}\nother = Net()\n")
    for name in ("Net", "other", "Net"):
        assert isinstance(built_module(f"python/./net.py:{name}")[0], nn.Identity)
    assert (folder / "runs").read_text() == "x"


def test_an_installed_package_goes_before_a_file_of_its_name_in_the_working_folder(folder):
    (folder / "timm.py").write_text("raise RuntimeError('the wrong file')")
    with pytest.raises(InputError, match="has no 'Net'"):
        built_module("python/timm:Net")


FAULTS = {
    "python/net": "give python/MODULE:FUNCTION",
    "python/:Net": "give python/MODULE:FUNCTION",
    "python/no-name:Net": "'no-name' is no name of a module",
    "python/absent:Net": "there is no module absent, neither installed nor in ",
    "python/absent.net:Net": "there is no module absent, neither",
    "python/absent.py:Net": "there is no file .*absent.py",
    "python/net:Nat": "net.py has no 'Nat'; it has Net, fails, needs, leaves",
    "python/net:fails": "fails (ValueError: two, net.py:8)",
    "python/net:needs": "called without arguments",
    "python/net:leaves": "fails (SystemExit: 3, net.py:13)",
    "python/net:text": "is a str; name a function",
    "python/net:gives": "returns an int; return a torch module",
    "python/imports:Net": "imports imports no_such_package, which is not there; install it",
    "python/divides:Net": "divides can't be imported (ZeroDivisionError: division by zero, divides.py:1)",
    "python/divides.py:Net": "divides.py can't be imported (ZeroDivisionError",
    "python/cut:Net": r"cut can't be imported (SyntaxError",
    "python/ends:Net": "ends can't be imported (SystemExit: 2, ends.py:1)",
}
"""Teacher -> what its line says, with parentheses as they are."""


@pytest.mark.parametrize(("spec", "line"), FAULTS.items())
def test_code_that_cant_be_used_is_one_line_that_names_it(spec, line, folder):
    functions = "def fails():\n    raise ValueError('two\\nlines')\ndef needs(x):\n    return x\n"
    functions += "text = 'x'\ndef leaves():\n    raise SystemExit(3)\ndef gives():\n    return 3\n"
    (folder / "net.py").write_text(f"{GOOD}\n\n{functions}")
    (folder / "imports.py").write_text("import no_such_package")
    (folder / "divides.py").write_text("1 / 0")
    (folder / "cut.py").write_text("def Net(:")
    (folder / "ends.py").write_text("raise SystemExit(2)")
    with pytest.raises(InputError, match=line.replace("(", r"\(").replace(")", r"\)")) as caught:
        built_module(spec)
    assert str(caught.value).startswith(f"{spec}: ")
    assert "\n" not in str(caught.value)


def test_a_given_module_is_copied_and_a_given_function_is_called():
    module = nn.Linear(2, 2).train()
    copy, _ = built_module(GivenTeacher.of(module))
    assert copy is not module
    assert copy.weight.equal(module.weight)
    assert isinstance(built_module(GivenTeacher.of(lambda: module))[0], nn.Linear)


def test_a_given_module_that_cant_be_copied_names_the_way_out():
    module = nn.Identity()
    module.lock = threading.Lock()
    with pytest.raises(InputError, match=r"Identity: can't be copied .*; give a function that returns it"):
        built_module(GivenTeacher.of(module))
