"""Recipes: named sets of pre-training values, a YAML file each in this folder; the comment on top says whose."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from fastmae.config import RecipesConfig
from fastmae.errors import InputError

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """The names that --recipe takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe.

    Raises:
        InputError: no recipe of this name.
    """
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), 1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise InputError(f"no recipe '{name}'{hint}; recipes: {', '.join(recipe_names())}")
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def list_recipes(config: RecipesConfig) -> dict[str, Any]:
    """The command `fastmae recipes`: each name with the first line of its file."""
    first_lines = {name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in recipe_names()}
    for name, line in first_lines.items():
        print(f"{name:16} {line.lstrip('# ')}")
    return {"recipes": list(first_lines)}
