"""A tiny pre-trained run, exported in every format by the real command."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import fastmae
from fastmae.cli import run
from fastmae.exporting.export import FORMATS
from fastmae.exporting.exported_model import ExportedModel, encoder_to_export
from fastmae.runs.encoder import open_encoder


@pytest.fixture(scope="session")
def exports(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> exported folder."""
    folders = {name: tmp_path_factory.mktemp("exports") / name for name in FORMATS}
    for name, folder in folders.items():
        assert run(["export", str(tiny_run), str(folder), "--format", name]) == 0
    return folders


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Noise as normalised images, [3, 3, 64, 64]."""
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def small_vit() -> Callable[..., ExportedModel]:
    """(arguments of timm) -> a ViT of six blocks of width 64 with random weights, as `export` hands it to a format."""

    def build(**arguments: Any) -> ExportedModel:
        model = encoder_to_export(open_encoder("timm/test_vit", 64, pretrained=False))
        torch.manual_seed(0)
        network = timm.create_model("test_vit", img_size=64, num_classes=0, **arguments).eval()
        return replace(model, network=network)

    return build


@pytest.fixture(scope="session")
def tokens(tiny_run: Path, images: torch.Tensor) -> torch.Tensor:
    """The tokens that the run's encoder computes from `images`: class token and patch tokens, [3, 1 + 16, 64]."""
    with torch.inference_mode():
        return fastmae.load_encoder(tiny_run).forward_features(images)


@pytest.fixture(scope="session")
def picture(photos: Path) -> Image.Image:
    """A photo that is not square."""
    return Image.open(photos / "train" / "china" / "00.jpg").convert("RGB")


@pytest.fixture
def run_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Any], dict[str, Any]]:
    """(exported folder, images) -> the variables that the model card's Python code leaves behind, run in the folder."""

    def run_code(folder: Path, images: Any) -> dict[str, Any]:
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
        monkeypatch.chdir(folder)
        variables = {"images": images}
        with torch.inference_mode():
            exec(code, variables)
        return variables

    return run_code
