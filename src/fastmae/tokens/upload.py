"""Copying a finished folder to a URL: what lies there already stays, and the file that makes it complete comes last.

So a copy that was killed is continued by the same call, and nobody finds half a store that looks like a whole one.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmae.errors import FailedCheckError, InterruptedRunError
from fastmae.outside.regular_file import open_regular
from fastmae.runtime.cards import CARD_FILE, LARGEST_CARD, is_unedited
from fastmae.runtime.progress import Progress
from fastmae.tokens import transfer
from fastmae.tokens.format import SHARDS_FOLDER
from fastmae.tokens.manifest import read_header
from fastmae.tokens.places import Found, Place, Source, size_of

log = logging.getLogger(__name__)

Files = Mapping[str, Source]
"""Name below the URL -> what is copied there."""
MEGABYTE = 1_000_000
LARGEST_COMPARED = 4 * MEGABYTE
"""Bytes of a file that is fetched to see whether it is the same. A larger one is sent again."""


class Copied(NamedTuple):
    """What an upload has done.

    Attributes:
        sent: number of files that were sent.
        kept: number of files that lay there already.
        bytes: of all files together.
    """

    sent: int
    kept: int
    bytes: int


def upload(place: Place, groups: Sequence[Files]) -> Copied:
    """Copy files to a URL, and make sure that they lie there.

    Args:
        place: where to.
        groups: what to copy. A group is complete before the next one begins.

    Raises:
        InputError: the place can't be read or written.
        FailedCheckError: a file is not there afterwards, or not with its size.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    found = place.found()
    sizes = {name: size_of(source) for files in groups for name, source in files.items()}
    try:
        missing = [dict(_missing(place, files, found)) for files in groups]
        left = sum(sizes[name] for files in missing for name in files)
        with _MegabyteBar(sum(sizes.values()), left) as bar:
            for files in missing:
                if files:
                    place.put(files, bar.advance)
    except KeyboardInterrupt as stop:
        raise InterruptedRunError("interrupted; what was sent stays there, and the same call continues") from stop
    sent = sum(map(len, missing))
    if sent:
        _check_arrival(place, sizes)
    return Copied(sent, len(sizes) - sent, sum(sizes.values()))


def card_to_send(place: Place, card: bytes) -> dict[str, Source]:
    """The card, unless somebody has edited the one that lies there: that one stays."""
    found = place.found().get(CARD_FILE)
    if found is not None:
        there = transfer.read(place.url, CARD_FILE, LARGEST_CARD)
        if there != card and not is_unedited(there):
            log.info(f"{place.url}/{CARD_FILE}: was edited, and stays as it is")
            return {}
    return {CARD_FILE: card}


def _missing(place: Place, files: Files, found: Mapping[str, Found]) -> Iterator[tuple[str, Source]]:
    """The files that do not lie there as they are here."""
    for name, source in files.items():
        if name not in found or not _is_same(place, name, source, found[name]):
            yield name, source


def _is_same(place: Place, name: str, source: Source, found: Found) -> bool:
    """Whether a file lies there as it is here, as far as that can be told without fetching it.

    A server's digest is compared. Without one, a small file is fetched whole, and of a shard its header, which holds a
    checksum of every tensor.
    """
    if found.size != size_of(source):
        return False
    if "sha256" in found.digests or "git" in found.digests:
        return all(_digest(source, kind) == value for kind, value in found.digests.items())
    if isinstance(source, Path) and f"{SHARDS_FOLDER}/" in name:
        header = read_header(source)
        return transfer.read_head(place.url, name, len(header)) == header
    if "md5" in found.digests:
        return _digest(source, "md5") == found.digests["md5"]
    if found.size > LARGEST_COMPARED:
        return False
    return _digest(transfer.read(place.url, name, LARGEST_COMPARED), "sha256") == _digest(source, "sha256")


def _digest(source: Source, kind: str) -> str:
    """A digest in hex: md5, sha256, or git, which is SHA-1 over the file with git's own words in front."""
    digest: Any = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % size_of(source))
    if isinstance(source, bytes):
        digest.update(source)
        return str(digest.hexdigest())
    with open_regular(source) as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def _check_arrival(place: Place, sizes: Mapping[str, int]) -> None:
    found = place.found()
    wrong = [name for name, size in sizes.items() if name not in found or found[name].size != size]
    if wrong:
        there = f"{found[wrong[0]].size} bytes instead of {sizes[wrong[0]]}" if wrong[0] in found else "not there"
        first = f"{place.url}/{wrong[0]}: {there}"
        raise FailedCheckError(f"{len(wrong)} files did not arrive (first: {first}); give the same command again")


class _MegabyteBar(Progress):
    """Progress in whole megabytes, of bytes.

    Args:
        total: bytes of all files.
        left: bytes of those that are sent now.
    """

    def __init__(self, total: int, left: int):
        self._bytes = total - left
        done = self._bytes // MEGABYTE
        super().__init__("upload", "MB", total=max(1, -(-total // MEGABYTE)), done=done, quiet=not left)

    def advance(self, units: int, **fields: str) -> None:
        """Count bytes."""
        self._bytes += units
        super().advance(-(-self._bytes // MEGABYTE) - self.done, **fields)
