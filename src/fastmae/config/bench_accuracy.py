"""Options of `fastmae bench accuracy`."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from fastmae.config.options import options
from fastmae.config.ranges import COMMAS, MINUTES, ROUNDS
from fastmae.config.recipes import check_baseline
from fastmae.config.resolve import shown
from fastmae.config.study import StudyConfig
from fastmae.errors import InputError

FRACTION = r"\d{1,6}(?:/\d{1,6})?|\d?\.\d{1,9}"
"""Python would take 1e1000000000 for a fraction too, and write it out."""
MOST_FRACTIONS = 100


@options
class BenchAccuracyConfig(StudyConfig):
    """Train FastMAE's recipes and MAE on the same images and draw accuracy over training time: Fig. 5 at your size."""

    images: Path
    """Labelled images, train/<class>/* and val/<class>/*: train/ is pre-trained on without its labels; val/ is
    measured."""
    out: Path = Path("fastmae-accuracy")
    """Folder for the store, the runs, the figure and the table. The same call again continues."""
    recipe: Annotated[str, COMMAS] = "visible_tiny_cpu,vit_tiny_cpu"
    """Recipes of FastMAE, separated by commas. Each is compared with MAE."""
    distillation: bool = True
    """Also train the first recipe with nothing masked: plain distillation out of the store."""
    minutes: Annotated[float, MINUTES] = 30.0
    """Training time of all runs together. Tokenising and measuring are reported separately."""
    fractions: Annotated[str, COMMAS] = "1/80,1/40,1/20,1/10,1/5"
    """Training times of FastMAE's runs as fractions of MAE's, separated by commas. Each is a run of its own: its
    schedule ends with its time, and it is measured at its end."""
    points: Annotated[int, ROUNDS] = 10
    """Measurements along MAE's one long run, evenly over its epochs, besides the one before training. Its best one
    counts."""

    inputs = ("images",)

    @property
    def recipes(self) -> list[str]:
        """FastMAE's recipes, in the order given."""
        return [name.strip() for name in self.recipe.split(",")]

    @property
    def time_fractions(self) -> tuple[Fraction, ...]:
        """The training times of FastMAE's runs, divided by MAE's; the shortest first."""
        return tuple(sorted(Fraction(word.strip()) for word in self.fractions.split(",")))

    def check(self) -> None:
        """Refuse recipes that can't be compared, and fractions that are none."""
        for recipe in self.recipes:
            check_baseline(self.mae_recipe, recipe)
        if len(set(self.recipes)) < len(self.recipes):
            raise InputError(f"--recipe {self.recipe}: a recipe is given twice")
        try:
            words = self.fractions.split(",")
            are_short = len(words) <= MOST_FRACTIONS and all(re.fullmatch(FRACTION, word.strip()) for word in words)
            fractions = self.time_fractions if are_short else ()
        except ZeroDivisionError:
            fractions = ()
        if not fractions or len(set(fractions)) < len(fractions) or not all(0 < number <= 1 for number in fractions):
            raise InputError(
                f"--fractions {shown(self.fractions)}: give different numbers above 0, at most 1, separated by commas, "
                "as 1/20,1/5"
            )
