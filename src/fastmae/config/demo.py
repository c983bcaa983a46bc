"""Options of `fastmae demo`."""

from pathlib import Path
from typing import Annotated

from fastmae.config.common import Common
from fastmae.config.options import options
from fastmae.config.ranges import MINUTES


@options
class DemoConfig(Common):
    """The whole path in minutes: tokenise, pre-train MAE and FastMAE equally long, compare by k-NN, draw a page."""

    images: Path | None = None
    """Your own labelled images, train/<class>/* and val/<class>/*. Default: scikit-learn's handwritten digits."""
    out: Path = Path("fastmae-demo")
    """Folder for everything that the demo writes."""
    minutes: Annotated[float, MINUTES] = 1.3
    """Pre-training time of each of the three methods: MAE, FastMAE as in the paper, and FastMAE on the visible patches
    alone. The rest takes less than a minute."""
