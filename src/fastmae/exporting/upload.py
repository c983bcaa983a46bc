"""`fastmae upload`: a token store or an exported model to a URL."""

from typing import Any

from fastmae.config import UploadConfig
from fastmae.errors import InputError
from fastmae.exporting.share import share_export
from fastmae.offline.share import share_store
from fastmae.runtime.cards import EXPORT_FILE
from fastmae.tokens.format import LISTS_FOLDER, SCALES_FILE, STORE_FILE


def upload(config: UploadConfig) -> dict[str, Any]:
    """Copy a folder to a URL; returns the command's JSON.

    Raises:
        InputError: the folder is neither a finished store nor an export, or the URL can't be written to.
        FailedCheckError: a file did not arrive.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    if (config.folder / EXPORT_FILE).is_file():
        return share_export(config.folder, config.url)
    if any((config.folder / name).exists() for name in (STORE_FILE, SCALES_FILE, LISTS_FOLDER)):
        return share_store(config.folder, config.url)
    what = "is neither a token store nor an export" if config.folder.is_dir() else "does not exist"
    raise InputError(f"{config.folder}: {what}; give a folder that `fastmae tokenize` or `fastmae export` wrote")
