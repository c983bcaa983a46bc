"""What the documents show runs."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fastmae import TokenStore
from fastmae.cli import COMMANDS, _command, parse, run

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


def shown_commands():
    """Every `fastmae ...` line of a code block, in the README and the guide."""
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        inside = False
        for line in page.read_text(encoding="utf-8").splitlines():
            inside = inside != line.startswith("```")
            if inside and line.startswith("fastmae "):
                yield pytest.param(line.split("#")[0].rstrip(), id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(shown_commands()))
def test_every_command_shown_is_one(line):
    words = [word for word in shlex.split(line)[1:] if word != "..."]
    command, rest = _command(words)
    parse(command, rest)


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.glob("*.md")], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_options_named_in_the_guide_exist():
    known = {f"--{prefix}{f.name.replace('_', '-')}" for kind, _ in COMMANDS.values() for f in fields(kind) for prefix in ("", "no-")}
    others = {
        "--help",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--ntasks",
        "--gpus-per-task",
    }  # and launchers'
    for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
        assert named <= known | others, (page.name, named - known - others)
