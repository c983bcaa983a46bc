"""Documents agree with the code: links, options, commands, recipes. `end_to_end/test_guide.py` runs the commands."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.config.commands import COMMANDS
from fastmae.config.recipes import recipe_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README, CONTRIBUTING = DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"
OTHER_PROGRAMS_OPTIONS = {
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun
    *("--ntasks", "--gpus-per-task"),  # srun
    "--folder",  # tools/rehearse_scale.py
    *("--budget", "--stages", "--work", "--cpu", "--detect", "--count"),  # tools/gpu_check
}


@pytest.mark.parametrize("codec", ["fp16", "int8", "pq16"])
def test_the_example_reads_a_store_with_safetensors_alone(codec, photos, vit_weights, tmp_path):
    store = tmp_path / "store"
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    options = [*teacher, "--middle-size", "96", "--workers", "0", "--codec", codec]
    assert run(["tokenize", str(photos / "train"), str(store), *options]) == 0
    example = DOCS / "read_store.py"
    lines = [line for line in example.read_text(encoding="utf-8").splitlines() if line]
    assert "fastmae" not in "".join(line for line in lines if "import" in line)
    assert len([line for line in lines if not line.startswith(("import", "from", '"""'))]) <= 20
    command = [sys.executable, str(example), str(store)]
    output = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    tokens = TokenStore(store).view(0, 0, 0, 6).tokens
    assert output["shape"] == list(tokens.shape)
    assert output["mean"] == pytest.approx(tokens.mean().item(), abs=1e-4)
    assert output["jpeg_bytes"] > 0


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), (target, anchor)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.name)
def test_every_option_on_a_page_exists(page):
    names = {field.name.replace("_", "-") for command in COMMANDS.values() for field in fields(command.kind)}
    options = {f"--{prefix}{name}" for name in names for prefix in ("", "no-")} | {"--help", "--version"}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert mentioned - options - OTHER_PROGRAMS_OPTIONS == set()


def test_the_guide_has_a_section_for_every_command():
    headings = re.findall(r"^## (.+)$", (DOCS / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    described = [name for heading in headings for name in heading.split(", ")]
    assert sorted(described) == sorted({command.split()[0] for command in COMMANDS})


def test_the_guide_has_a_row_for_every_recipe():
    lines = (DOCS / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == recipe_names()


def test_every_page_is_in_the_table_of_contents_and_in_the_sites_menu():
    contents = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in contents] == []
    sections = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    menu = [
        page for section in sections for entries in section.values() for entry in entries for page in entry.values()
    ]
    assert sorted(menu) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.name)
def test_lines_are_no_longer_than_120_characters_except_in_tables_and_links(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [
        line for line in lines if len(line) > 120 and not line.startswith(("|", "![")) and " " in line.strip()
    ] == []
