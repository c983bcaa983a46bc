"""The rules of the house that a machine can check."""

import ast
from functools import cache
from pathlib import Path

import pytest

import fastmae
from fastmae.config.commands import COMMANDS

SOURCE = Path(fastmae.__file__).parent
TESTS = Path(__file__).parent

FLOW = (
    *("errors", "outside", "config", "runtime", "images", "teachers", "tokens", "offline", "student", "runs", "probes"),
    *("training", "pretraining", "evaluate", "exporting", "reporting", "bench", "studies", "api", "cli", "__main__"),
)
"""Data flows down this list. A folder imports from the folders above it and from itself, never from below."""


def modules() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def folder_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def imported_modules(path: Path) -> frozenset[Path]:
    """The files of this package that a file imports, also inside functions and under TYPE_CHECKING."""
    files = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.startswith("fastmae."):
                base = SOURCE / name.removeprefix("fastmae.").replace(".", "/")
                files |= {file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()}
    return frozenset(files)


def test_every_folder_has_its_place_in_the_flow():
    assert {folder_of(path) for path in modules()} == set(FLOW)


def test_imports_follow_the_flow_of_the_data():
    against = [
        f"{path.relative_to(SOURCE)} imports {imported.relative_to(SOURCE)}"
        for path in modules()
        for imported in imported_modules(path)
        if imported != SOURCE / "__init__.py" and FLOW.index(folder_of(imported)) > FLOW.index(folder_of(path))
    ]
    assert against == []


def test_no_modules_import_each_other_in_a_circle():
    finished: set[Path] = set()

    def visit(path: Path, chain: tuple[Path, ...]) -> None:
        assert path not in chain, " -> ".join(str(p.relative_to(SOURCE)) for p in (*chain, path))
        if path in finished:
            return
        for imported in imported_modules(path):
            # A package's __init__ gathers names from its own modules; they may import the package's other names.
            if imported != path and imported.name != "__init__.py":
                visit(imported, (*chain, path))
        finished.add(path)

    for path in modules():
        if path.name != "__init__.py":
            visit(path, ())


def test_the_root_holds_at_most_five_modules():
    names = {path.name for path in SOURCE.glob("*.py")}
    assert names == {"__init__.py", "__main__.py", "api.py", "cli.py", "errors.py"}


def test_the_tests_mirror_the_source():
    missing = [
        str(test.relative_to(TESTS))
        for test in TESTS.rglob("test_*.py")
        if test.parent not in (TESTS, TESTS / "end_to_end", TESTS / "simulated")
        and not any(source.exists() for source in mirrored_by(test))
    ]
    assert sorted(missing) == sorted(TESTS_OF_SEVERAL_MODULES)


def mirrored_by(test: Path) -> list[Path]:
    """Where the source of a test file may be: a module of the package; a script, or a folder of them, in tools/."""
    name = test.relative_to(TESTS).with_name(test.name.removeprefix("test_"))
    return [SOURCE / name, TESTS.parent / name, TESTS.parent / name.with_suffix("")]


TESTS_OF_SEVERAL_MODULES = {
    "pretraining/test_step_syncs.py",
    "runtime/test_without_sigusr1.py",
    "tokens/test_damage.py",
    "tokens/test_store.py",
}
"""Tests of what several modules do together."""


def test_the_store_knows_no_models_and_the_student_no_files():
    for path in (SOURCE / "tokens").glob("*.py"):
        assert {folder_of(file) for file in imported_modules(path)} <= {
            "errors",
            "outside",
            "runtime",
            "images",
            "tokens",
            "__init__",
        }
    for path in (SOURCE / "student").glob("*.py"):
        assert not {folder_of(file) for file in imported_modules(path)} & {"offline", "runs", "training"}


def test_training_knows_no_task():
    known = {folder_of(file) for path in (SOURCE / "training").glob("*.py") for file in imported_modules(path)}
    assert known <= {"errors", "outside", "config", "runtime", "runs", "training"}


def test_every_command_has_a_file_of_options_named_like_it():
    for name, command in COMMANDS.items():
        file = "recipes" if name == "recipes" else name.replace(" ", "_")
        assert command.kind.__module__ == f"fastmae.config.{file}"


def test_the_package_logs_and_only_the_command_line_prints():
    printing = {
        str(path.relative_to(SOURCE))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    }
    assert printing == {"cli.py", "runtime/console.py"}


def test_no_file_is_over_400_lines():
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.promise("files")
def test_networks_are_built_and_tensors_read_in_one_place():
    """But that the hub's weights are asked for by a user, and that an export is read back as timm reads it."""
    places: dict[str, set[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                places.setdefault(ast.unparse(node.func), set()).add(str(path.relative_to(SOURCE)))
    assert places["timm.create_model"] == {
        "outside/networks.py",
        "teachers/factory.py",
        "exporting/timm_format.py",
    }
    assert places["torch.load"] == places["safetensors.torch.load_file"] == {"outside/tensors.py"}


@pytest.mark.promise("files")
def test_no_code_that_comes_with_a_model_is_run():
    calls = [
        node
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert calls
    for call in calls:
        assert any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords)


@pytest.mark.promise("files")
def test_no_data_file_is_unpickled():
    loads = [
        node
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"torch.load", "pickle.load", "pickle.loads", "np.load", "joblib.load"}
    ]
    assert loads
    for call in loads:
        assert ast.unparse(call.func) == "torch.load"
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


READS_ITS_OWN = {
    "bench/memory.py": "the system's account of this process",
    "config/recipes/__init__.py": "the package's recipes",
    "exporting/jittor/model.py": "the export that it is part of; it runs without the package",
    "exporting/model_card.py": "the package's template",
    "offline/dataset_card.py": "the package's template",
    "reporting/html_page.py": "the package's template",
    "runs/folder.py": "what it has just written as JSON, for comparison",
    "runtime/memory.py": "the system's account of memory",
    "runtime/ownership.py": "the system's account of its start",
    "runtime/processes.py": "the system's account of a process",
    "runtime/processor.py": "the system's description of the CPU",
    "tokens/cache.py": "its own note of the room that is left; any other content counts as none",
}
"""Modules that read what no stranger can have written, and what that is."""


@pytest.mark.promise("files")
def test_documents_from_outside_are_read_by_a_door_alone():
    by_themselves = {
        str(path.relative_to(SOURCE))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and reads_a_document(ast.unparse(node.func))
    }
    doors = {name for name in by_themselves if name.startswith("outside/")}
    assert doors
    assert by_themselves - doors == READS_ITS_OWN.keys()


def reads_a_document(function: str) -> bool:
    """Whether a function that is called parses JSON or YAML, or reads a whole file."""
    return function in {"json.load", "json.loads", "yaml.load", "yaml.safe_load"} or function.endswith(
        (".read_text", ".read_bytes")
    )


@pytest.mark.promise("files")
def test_every_image_is_opened_by_the_one_function_that_names_the_formats():
    opening = {
        (str(path.relative_to(SOURCE)), ast.unparse(node))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    }
    assert opening == {("images/decode.py", "Image.open(file, formats=FORMATS)")}


READERS = {"decode_bands", "resized_pixels", "make_middle_image", "WholeImages", "LabelledImages", "PairReader"} | {
    *("check_data", "check_sizes", "TrainingPhotos", "ValidationPhotos", "load_photo", "draw_detections"),
}
"""What decodes images, or hands on how they are decoded."""


def test_all_that_decodes_images_is_told_their_value_range():
    without = [
        f"{path.relative_to(SOURCE)}: {ast.unparse(node)}"
        for path in modules()
        if folder_of(path) in {"images", "offline", "probes", "evaluate", "bench", "studies"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS and "value_range" not in ast.unparse(node)
    ]
    assert [call for call in without if not call.startswith("bench/") or "check_sizes" not in call] == []
