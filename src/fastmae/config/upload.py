"""Options of `fastmae upload`."""

from pathlib import Path

from fastmae.config.common import Common
from fastmae.config.options import options


@options
class UploadConfig(Common):
    """Copy a finished token store or an exported model to a URL; the same call again sends only what is missing."""

    folder: Path
    """The token store, or a folder that `fastmae export` wrote."""
    url: str
    """Where it will lie: s3://BUCKET/NAME, gs://BUCKET/NAME, hf://datasets/OWNER/NAME/STORE, hf://OWNER/NAME for a
    model, or any other URL that fsspec writes to. A repository of the hub is made if it does not exist, and is private
    at first."""
