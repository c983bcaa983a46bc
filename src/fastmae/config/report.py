"""Options of `fastmae report`."""

from pathlib import Path
from typing import Annotated

from fastmae.config.common import Common
from fastmae.config.options import options
from fastmae.config.ranges import COMMAS, GIGABYTES, Range


@options
class ReportConfig(Common):
    """Draw one HTML page of a run (its settings, its curves, what it learnt) or of a study. It needs no network."""

    run: Path
    """A pre-training run's folder, or a study's."""
    out: Path | None = None
    """The page. Default: RUN/report.html, or STUDY/study.html."""
    store: str = ""
    """Current place of the run's token store, a folder or a URL. Default: where it was when the run trained."""
    cache: Path = Path("~/.cache/fastmae")
    """As in pretrain, for a remote store."""
    cache_size: Annotated[float, GIGABYTES] = 50.0
    """As in pretrain."""
    also: Annotated[str, COMMAS] = ""
    """More to show, separated by commas: folders of finetune, linear, segment, detect and bench accuracy; tables of
    bench (.md), each with the figure of the same name beside it."""
    images: Annotated[int, Range(ge=1, le=100)] = 6
    """Pictures of each kind."""
    gallery: Annotated[int, Range(ge=2, le=1_000_000)] = 2000
    """Number of the store's images among which nearest neighbours are searched."""

    inputs = ("run",)
