"""A finished token store, copied to a URL with its card: `fastmae upload`, and `--to` of `tokenize`."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from fastmae.errors import InputError
from fastmae.offline.dataset_card import dataset_card, keep_card
from fastmae.outside.regular_file import read_bounded
from fastmae.runtime.cards import CARD_FILE, EXPORT_FILE, LARGEST_CARD, is_unedited
from fastmae.runtime.wording import counted
from fastmae.tokens import TokenStore, transfer
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.format import (
    LARGEST_DESCRIPTION,
    MANIFEST_FILE,
    SCALES_FILE,
    STORE_FILE,
    StoreInfo,
    read_store_info,
    shard_name,
)
from fastmae.tokens.places import HubRepository, Place, open_place
from fastmae.tokens.reader import open_scales
from fastmae.tokens.upload import Copied, Files, card_to_send, upload

log = logging.getLogger(__name__)


def check_url(url: str) -> None:
    """Make sure that files can be copied to a URL, before hours of work: it is known, and answers.

    A repository of the hub is made if it does not exist.

    Raises:
        InputError: no such kind of URL, no permission, a server that can't be reached.
    """
    place = open_place(url)
    place.begin()
    place.found()


def share_store(folder: Path, url: str) -> dict[str, Any]:
    """Copy a finished store to a URL; returns the command's JSON.

    Args:
        folder: the store.
        url: its folder there.

    Raises:
        InputError: no finished store, another one behind the URL, or a URL that can't be written to.
        FailedCheckError: a file did not arrive.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    stores = open_scales(folder)
    for store in stores:
        _check_shards(store)
    place = open_place(url)
    place.begin()
    refuse_beside(place, {EXPORT_FILE}, "an exported model")
    keep_card(folder, stores)
    for store in stores:
        _refuse_other_store(place, store, _prefix(store, stores))
    copied = upload(place, _groups(folder, stores, place))
    if isinstance(place, HubRepository) and place.folder:
        _share_root_card(place, stores)
    return report(place, copied, f"`fastmae verify {place.url}` reads every byte back")


def refuse_beside(place: Place, files: set[str], what: str) -> None:
    """Refuse to mix a store and an export: both have a card.

    Args:
        place: where to.
        files: that tell the other kind.
        what: the other kind.

    Raises:
        InputError: it lies there.
    """
    if files & place.found().keys():
        raise InputError(f"{place.url}: holds {what}; give another URL")


def report(place: Place, copied: Copied, check: str) -> dict[str, Any]:
    """Say what an upload has done; returns the command's JSON."""
    files = copied.sent + copied.kept
    log.info(
        f"{place.url}: {counted(files, 'file')}, {copied.bytes / 1e6:.1f} MB; {copied.sent} sent, "
        f"{copied.kept} lay there already; {check}"
    )
    return {"url": place.url, "files": files, "sent": copied.sent, "kept": copied.kept, "bytes": copied.bytes}


def _prefix(store: TokenStore, stores: list[TokenStore]) -> str:
    """Of the names of a store's files, within the folder of all middle sizes."""
    return f"{store.info.middle_size}/" if len(stores) > 1 else ""


def _groups(folder: Path, stores: list[TokenStore], place: Place) -> list[Files]:
    """What is sent, in the order in which it must arrive: a reader looks for the last ones first."""
    contents: dict[str, Path] = {}
    descriptions: dict[str, Path] = {}
    manifests: dict[str, Path] = {}
    for store in stores:
        prefix = _prefix(store, stores)
        shards = [shard_name(shard) for shard in range(store.info.shards)]
        contents |= {f"{prefix}{name}": store.folder / name for name in (*shards, *store.manifest.files)}
        descriptions[f"{prefix}{STORE_FILE}"] = store.folder / STORE_FILE
        manifests[f"{prefix}{MANIFEST_FILE}"] = store.folder / MANIFEST_FILE
    card = card_to_send(place, _card(folder, stores, place.url))
    groups: list[Files] = [contents, {**descriptions, **card}, manifests]
    return groups if len(stores) == 1 else [*groups, {SCALES_FILE: folder / SCALES_FILE}]


def _card(folder: Path, stores: list[TokenStore], url: str) -> bytes:
    """The card that the URL gets: the user's, or else one that names the URL."""
    file = folder / CARD_FILE
    here = read_bounded(file, LARGEST_CARD) if file.exists() else None
    return dataset_card(stores, url).encode() if here is None or is_unedited(here) else here


def _share_root_card(place: HubRepository, stores: list[TokenStore]) -> None:
    """Give a repository without a card that of the store in it: the hub shows only the card at its root."""
    root, card = HubRepository(place.root), dataset_card(stores, place.url).encode()
    if CARD_FILE in root.found():
        there = transfer.read(root.url, CARD_FILE, LARGEST_CARD)
        if there == card or not is_unedited(there) or place.url.encode() not in there:
            return
    root.put({CARD_FILE: card}, lambda _: None)


def _check_shards(store: TokenStore) -> None:
    """Make sure that all shards are there, with their sizes.

    Raises:
        InputError: one is not.
    """
    for name, size in store.manifest.sizes().items():
        file = store.folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise InputError(f"{file}: missing or truncated; `fastmae verify {store.folder} --repair` makes it again")


def _refuse_other_store(place: Place, store: TokenStore, prefix: str) -> None:
    """Refuse to write over a store of other images, or of another teacher. An earlier state of this one is replaced."""
    url, name = place.url, f"{prefix}{STORE_FILE}"
    try:
        text = transfer.read(url, name, LARGEST_DESCRIPTION)
    except MissingFileError:
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / STORE_FILE).write_bytes(text)
        try:
            there = read_store_info(Path(folder))
        except InputError as error:
            raise InputError(f"{url}/{name}: is no description of a token store; give another URL") from error
    if differences := [text for text in _differences(store.info, there) if text]:
        raise InputError(
            f"{url}: holds another store ({'; '.join(differences)}); give another URL, or delete that store there"
        )


def _differences(ours: StoreInfo, there: StoreInfo) -> list[str]:
    """What differs, but for images that were added since."""
    lists = [part.images_sha256 for part in ours.parts]
    is_earlier = lists[: len(there.parts)] == [part.images_sha256 for part in there.parts]
    return [text for text in there.differences(ours) if not (is_earlier and text.startswith("images: "))]
