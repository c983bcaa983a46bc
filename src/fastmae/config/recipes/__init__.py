"""Recipes: named sets of pre-training values, one YAML file each in this folder. Its first line says whose they are."""

import difflib
import logging
from pathlib import Path
from typing import Any

import yaml

from fastmae.config.common import Common
from fastmae.config.options import options
from fastmae.errors import InputError

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
SHARED_WITH_BASELINE = ("encoder", "encoder_width", "encoder_depth", "encoder_heads", "image_size", "batch_size")
"""Options that must be equal in a recipe and its baseline, so that the two can be compared."""


@options
class RecipesConfig(Common):
    """List the recipes."""


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


def check_baseline(mae_recipe: str, recipe: str) -> None:
    """Check that a recipe of MAE trains the same encoder on the same views as one of FastMAE.

    Raises:
        InputError: no such recipe, or two that can't be compared.
    """
    baseline, ours = load_recipe(mae_recipe), load_recipe(recipe)
    for option in SHARED_WITH_BASELINE:
        if baseline.get(option) != ours.get(option):
            raise InputError(
                f"--mae-recipe {mae_recipe}: its {option} is {baseline.get(option)}, that of {recipe} is "
                f"{ours.get(option)}; they must be equal for a comparison"
            )


def list_recipes(config: RecipesConfig) -> dict[str, Any]:
    """The command `fastmae recipes`: each name with the first line of its file."""
    first_lines = {
        name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in recipe_names()
    }
    for name, line in first_lines.items():
        log.info(f"{name:16} {line.lstrip('# ')}")
    return {"recipes": list(first_lines)}
