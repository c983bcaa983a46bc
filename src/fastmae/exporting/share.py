"""An exported model, copied to a URL with its card: `fastmae upload`, and `--to` of `export`."""

from pathlib import Path
from typing import Any

from fastmae.errors import InputError
from fastmae.exporting.output_folder import read_export
from fastmae.offline.share import refuse_beside, report
from fastmae.outside.documents import parse_json
from fastmae.outside.regular_file import read_bounded
from fastmae.runtime.cards import CARD_FILE, EXPORT_FILE, LARGEST_CARD
from fastmae.tokens import transfer
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.format import SCALES_FILE, STORE_FILE
from fastmae.tokens.places import Place, open_place
from fastmae.tokens.upload import card_to_send, upload

LARGEST_EXPORT_FILE = 64 << 20
"""Bytes. It lists the names of a classifier's classes."""


def share_export(folder: Path, url: str) -> dict[str, Any]:
    """Copy an exported model to a URL; returns the command's JSON.

    Raises:
        InputError: no export, an export of another format behind the URL, or a URL that can't be written to.
        FailedCheckError: a file did not arrive.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    description = read_export(folder)
    if not description:
        raise InputError(f"{folder}: is not an export; give a folder that `fastmae export` wrote")
    place = open_place(url)
    place.begin()
    refuse_beside(place, {STORE_FILE, SCALES_FILE}, "a token store")
    _refuse_other_format(place, description["format"])
    names = [name for name in description["files"] if name != CARD_FILE and Path(name).name == name]
    card = card_to_send(place, read_bounded(folder / CARD_FILE, LARGEST_CARD))
    copied = upload(place, [{name: folder / name for name in names} | card, {EXPORT_FILE: folder / EXPORT_FILE}])
    return report(place, copied, "the card tells how to load it")


def _refuse_other_format(place: Place, ours: str) -> None:
    """Refuse to mix the files of two formats."""
    try:
        text = transfer.read(place.url, EXPORT_FILE, LARGEST_EXPORT_FILE)
    except MissingFileError:
        return
    name = f"{place.url}/{EXPORT_FILE}"
    there = parse_json(text, dict[str, Any], name=name, way_out="give another URL").get("format")
    if there != ours:
        raise InputError(f"{name}: holds an export of the format {there}, not {ours}; give another URL")
