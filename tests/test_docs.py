"""The documents hold together: links, options, commands, recipes. (What they show is run by `end_to_end/test_guide.py`.)"""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fastmae import TokenStore
from fastmae.cli import COMMANDS, run
from fastmae.config.recipes import recipe_names

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("codec", ["fp16", "int8", "pq16"])
def test_the_example_reads_a_store_with_safetensors_alone(codec, photos, vit_weights, tmp_path):
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    args = [*teacher, "--middle-size", "96", "--workers", "0", "--codec", codec]
    assert run(["tokenize", str(photos / "train"), str(tmp_path / "s"), *args]) == 0
    example = DOCS / "read_store.py"
    assert "fastmae" not in "".join(line for line in example.read_text().splitlines() if "import" in line)
    assert (
        len(
            [
                line
                for line in example.read_text().splitlines()
                if line and not line.startswith(("import", "from", '"""'))
            ]
        )
        <= 20
    )
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path / "s")], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    tokens = TokenStore(tmp_path / "s").view(0, 0, 0, 6).tokens
    assert said["shape"] == list(tokens.shape)
    assert said["mean"] == pytest.approx(tokens.mean().item(), abs=1e-4)
    assert said["jpeg_bytes"] > 0


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.glob("*.md")], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert anchor in ["", *(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)], (
            target,
            anchor,
        )


def test_options_named_in_the_guide_exist():
    known = {
        f"--{prefix}{f.name.replace('_', '-')}"
        for kind, _ in COMMANDS.values()
        for f in fields(kind)
        for prefix in ("", "no-")
    }
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


def test_every_command_and_recipe_has_its_place_in_the_guide():
    headings = re.findall(r"^## (.+)$", (DOCS / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(word for heading in headings for word in heading.split(", ")) == sorted(
        {name.split()[0] for name in COMMANDS}
    )
    rows = [line for line in (DOCS / "recipes.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == recipe_names()


def test_every_page_is_in_the_contents():
    contents = (DOCS / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in contents for page in DOCS.glob("*.md") if page.name != "README.md")
