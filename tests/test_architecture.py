"""The house rules that a machine can check."""

import ast
from pathlib import Path

import fastmae

SOURCE = Path(fastmae.__file__).parent

# Data flows down this list; a room may import from the rooms above it and from itself, never from below.
ROOMS = [
    "errors durable config processes progress device weights linear decoder fabric",
    "images recipes loading",
    "teachers",
    "tokens",
    "inspect intake offline targets",
    "estimate verify",
    "tokenize",
    "model",
    "training",
    "runs",
    "encoders",
    "plan",
    "steps",
    "evaluate profile",
    "pretrain",
    "export",
    "report",
    "ablate bench demo",
    "cli __main__",
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("fastmae.")}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_imports_follow_the_flow_of_the_data():
    files = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    assert len(files) > 20
    against = [
        (str(path), room) for path in files for room in imported_rooms(path) if LEVEL[room] > LEVEL[room_of(path)]
    ]
    assert against == []


def test_the_store_knows_nothing_of_models_and_the_model_nothing_of_files():
    assert not any(
        imported_rooms(path) & {"teachers", "model", "training"} for path in (SOURCE / "tokens").glob("*.py")
    )
    assert imported_rooms(SOURCE / "model.py") <= {"errors", "linear", "decoder"}


def test_no_file_is_over_400_lines():
    assert {path.name: n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400} == {}


def test_no_data_file_is_unpickled():
    loads = [
        node
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"torch.load", "pickle.load", "pickle.loads", "np.load", "joblib.load"}
    ]
    assert loads
    for call in loads:
        assert ast.unparse(call.func) == "torch.load"
        assert any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)
