"""Options of `report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fastmae.config.common import Common


@dataclass(kw_only=True)
class ReportConfig(Common):
    """Draw one HTML page of a run: what it was, how it went, what it learnt. It needs no network and nothing beside it."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """A pre-training run's folder."""
    out: Path | None = None
    """The page; default: RUN/report.html."""
    store: str = ""
    """Where the run's token store is now, a folder or a URL; default: where it was when the run trained."""
    cache: Path = Path("~/.cache/fastmae")
    """As in pretrain, for a store at a URL."""
    cache_size: float = 50.0
    """As in pretrain."""
    also: str = ""
    """What else goes on the page, with commas between: folders of finetune, linear, segment, detect and bench accuracy, tables of
    bench (.md) with the figure of the same name beside them."""
    images: int = 6
    """Pictures of each kind."""
    gallery: int = 2000
    """Images of the store among which nearest neighbours are looked for."""
