"""A store behind a URL as a folder on this machine, to be checked: its small files, and each shard for a while.

So a store of any size is checked with the disk space of a few shards.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastmae.errors import InputError
from fastmae.outside.documents import read_json
from fastmae.tokens import transfer
from fastmae.tokens.access import MissingFileError
from fastmae.tokens.audit import Bring
from fastmae.tokens.format import (
    LARGEST_DESCRIPTION,
    LARGEST_SCALES,
    MANIFEST_FILE,
    SCALES_FILE,
    SHARDS_FOLDER,
    STORE_FILE,
)
from fastmae.tokens.manifest import LARGEST_MANIFEST, Manifest
from fastmae.tokens.reader import Scales
from fastmae.tokens.transfer import WrongSizeError


class RemoteCopy(NamedTuple):
    """A store behind a URL, as far as it is here.

    Attributes:
        url: of the store.
        folder: on this machine; it holds everything but the shards.
    """

    url: str
    folder: Path

    def named(self, text: str) -> str:
        """A message about the folder as one about the URL."""
        return text.replace(str(self.folder), self.url)

    def bring(self, below: Path) -> Bring:
        """What brings the shards of the store of one middle size, and takes them away again.

        Args:
            below: folder of that store, in `folder`.
        """
        url = self.named(str(below))
        manifest = _manifest_of(below)
        sizes = {} if manifest is None else manifest.sizes()

        @contextlib.contextmanager
        def brought(name: str) -> Iterator[None]:
            file = below / name
            file.touch()
            try:
                _fetch(url, name, file, sizes[name])
                yield
            finally:
                file.unlink()

        return brought


@contextlib.contextmanager
def remote_copy(url: str) -> Iterator[RemoteCopy]:
    """The copy of a store, without its shards; it goes at the end.

    Raises:
        InputError: no store lies there, or it can't be fetched.
    """
    url = url.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="fastmae-verify-") as temporary:
        copy = RemoteCopy(url, Path(temporary) / "store")
        copy.folder.mkdir()
        scales = copy.folder / SCALES_FILE
        try:
            scales.write_bytes(transfer.read(url, SCALES_FILE, LARGEST_SCALES))
        except MissingFileError:
            _fetch_small_files(url, copy.folder)
        else:
            sizes = read_json(scales, Scales, way_out="copy the store there again", limit=LARGEST_SCALES).sizes
            for size in sizes:
                _fetch_small_files(f"{url}/{size}", copy.folder / str(size))
        yield copy


def _fetch_small_files(url: str, folder: Path) -> None:
    """Everything of the store of one middle size but its shards. What is missing or too long is left out."""
    (folder / SHARDS_FOLDER).mkdir(parents=True)
    (folder / STORE_FILE).write_bytes(transfer.read(url, STORE_FILE, LARGEST_DESCRIPTION))
    (folder / MANIFEST_FILE).write_bytes(transfer.read(url, MANIFEST_FILE, LARGEST_MANIFEST))
    manifest = _manifest_of(folder)
    for name, (size, _) in ({} if manifest is None else manifest.files).items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        try:
            _fetch(url, name, file, size)
        except (MissingFileError, WrongSizeError):
            file.unlink()


def _fetch(url: str, name: str, file: Path, size: int) -> None:
    """Download a file. One that ends early, at every attempt, is shorter than it should be."""
    try:
        transfer.download(url, name, file, size)
    except InputError as error:
        if isinstance(error.__cause__, EOFError):
            raise WrongSizeError(f"{url}/{name}: truncated; copy it there again") from error
        raise


def _manifest_of(folder: Path) -> Manifest | None:
    """The manifest; None if it is damaged."""
    try:
        return Manifest.read(folder / MANIFEST_FILE)
    except InputError:
        return None
