"""Options of `fastmae inspect`."""

from pathlib import Path

from fastmae.config.common import Common
from fastmae.config.options import options


@options
class InspectConfig(Common):
    """Show what a token store holds."""

    store: Path
    """The token store."""
