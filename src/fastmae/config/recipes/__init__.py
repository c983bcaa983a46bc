"""Recipes: named sets of pre-training values, a YAML file each in this folder; the comment on top says whose."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from fastmae.config import RecipesConfig
from fastmae.errors import InputError

FOLDER = Path(__file__).parent
ALIKE = ("encoder", "encoder_width", "encoder_depth", "encoder_heads", "image_size", "batch_size")
"""What a recipe and its baseline share."""


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


def baseline_recipe(name: str, mine: str) -> dict[str, Any]:
    """The values of MAE's recipe beside one of FastMAE's: another target and learning rate, but the same encoder on the same views.

    Args:
        name: of MAE's recipe.
        mine: of FastMAE's.

    Raises:
        InputError: no such recipe, or one that can't be compared.
    """
    values, beside = load_recipe(name), load_recipe(mine)
    for option in ALIKE:
        if values.get(option) != beside.get(option):
            raise InputError(
                f"--mae-recipe {name}: its {option} is {values.get(option)}, that of {mine} {beside.get(option)}; both must be alike"
            )
    return values


def list_recipes(config: RecipesConfig) -> dict[str, Any]:
    """The command `fastmae recipes`: each name with the first line of its file."""
    first_lines = {
        name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in recipe_names()
    }
    for name, line in first_lines.items():
        print(f"{name:16} {line.lstrip('# ')}")
    return {"recipes": list(first_lines)}
