"""What the documents show runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastmae import TokenStore
from fastmae.cli import run

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("codec", ["fp16", "int8", "pq16"])
def test_the_example_reads_a_store_with_safetensors_alone(codec, photos, vit_weights, tmp_path):
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    args = [*teacher, "--middle-size", "96", "--workers", "0", "--codec", codec]
    assert run(["tokenize", str(photos / "train"), str(tmp_path / "s"), *args]) == 0
    example = DOCS / "read_store.py"
    assert "fastmae" not in "".join(line for line in example.read_text().splitlines() if "import" in line)
    assert len([line for line in example.read_text().splitlines() if line and not line.startswith(("import", "from", '"""'))]) <= 20
    done = subprocess.run([sys.executable, str(example), str(tmp_path / "s")], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    tokens = TokenStore(tmp_path / "s").view(0, 0, 0, 6).tokens
    assert said["shape"] == list(tokens.shape)
    assert said["mean"] == pytest.approx(tokens.mean().item(), abs=1e-4)
    assert said["jpeg_bytes"] > 0
