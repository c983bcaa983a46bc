"""Options of `fastmae inspect`."""

from pathlib import Path

from fastmae.config.common import Common
from fastmae.config.options import options
from fastmae.errors import InputError


@options
class InspectConfig(Common):
    """Show what a token store holds."""

    store: Path
    """The token store."""
    quality: bool = False
    """Look for what is wrong: pictures of one colour or of few levels, near-duplicates, tokens that hardly differ. The
    suspicious images are drawn on a contact sheet."""
    out: Path | None = None
    """File of the contact sheet, a PNG. Default: STORE-quality.png, beside the store."""

    inputs = ("store",)

    def check(self) -> None:
        """See `Options`."""
        if self.out is not None and not self.quality:
            raise InputError(f"--out {self.out}: is the contact sheet of --quality; give that too")
