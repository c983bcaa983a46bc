"""Options of `fastmae bench accuracy`."""

from pathlib import Path
from typing import Annotated

from fastmae.config.options import options
from fastmae.config.ranges import AT_LEAST_1, POSITIVE
from fastmae.config.study import StudyConfig


@options
class BenchAccuracyConfig(StudyConfig):
    """Train FastMAE and MAE for an equal time on the same images and draw accuracy over time: Fig. 5 at your size."""

    images: Path
    """Labelled images, train/<class>/* and val/<class>/*: train/ is pre-trained on without its labels; val/ is
    measured."""
    out: Path = Path("fastmae-accuracy")
    """Folder for the store, the runs, the figure and the table. The same call again continues."""
    minutes: Annotated[float, POSITIVE] = 30.0
    """Total training time, divided equally among the methods and seeds. Tokenising and measuring are reported
    separately."""
    points: Annotated[int, AT_LEAST_1] = 10
    """Measurements along each run, evenly over its epochs, besides the one before training."""
