"""A folder of image files, nested or flat, as a source: which files count as images. No file's content is read here."""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from fastmae.errors import InputError
from fastmae.images.entries import entry_of, key_of
from fastmae.outside.regular_file import open_regular

# A fixed list: asking Pillow or the system would make the image list depend on what is installed.
IMAGE_SUFFIXES = frozenset([
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2",
    ".jpe", ".jpeg", ".jpg", ".npy", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm",
    ".psd", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
])  # fmt: skip

LEADS_NOWHERE_ERRNOS = {errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG}
"""What the system answers when a path can't lead to anything."""


@dataclass(frozen=True)
class FolderSource:
    """Every image file below a folder; a key is the path relative to the folder, with `/` as separator.

    A file counts if it has an image suffix, or if it has no suffix and is not hidden (decoding then decides). Links are
    followed unless they lead back to a folder that contains them. Hidden folders are ignored.
    """

    path: Path
    kind: ClassVar[str] = "folder"

    def entries(self) -> Iterator[bytes]:
        """One entry for each image, in the system's order.

        Raises:
            InputError: a name contains the byte 1.
        """
        return (entry_of(self.path, name) for name in files_below(self.path, may_be_image))

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image's file.

        Raises:
            InputError: the key leads outside the folder.
            NotRegularError: a pipe, a socket or a device.
            OSError: the file can't be opened.
        """
        key = key_of(entry)
        if key.startswith("/") or ".." in key.split("/"):
            raise InputError(
                f"{self.path}: the list names {key[:80]!r}, outside this folder; "
                "it was changed by hand, list the images again"
            )
        return open_regular(self.path / key)


def files_below(folder: Path, matches: Callable[[str], bool]) -> Iterator[str]:
    """Paths, relative to `folder`, of the files whose name matches. Links and hidden folders: as in `FolderSource`."""
    return _files_below(folder, matches, "", frozenset())


def _files_below(folder: Path, matches: Callable[[str], bool], prefix: str, parents: frozenset[str]) -> Iterator[str]:
    """Matching paths with `prefix` in front; `parents` are the resolved folders on the way here, to stop link loops."""
    resolved = os.path.realpath(folder)
    if resolved in parents:
        return
    with os.scandir(folder) as children:
        for child in children:
            if leads_to(child, os.DirEntry.is_dir):
                if not child.name.startswith("."):
                    yield from _files_below(Path(child.path), matches, f"{prefix}{child.name}/", parents | {resolved})
            elif matches(child.name):
                yield prefix + child.name


def leads_to(child: os.DirEntry[str], is_kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """Whether a folder's child is a folder (`os.DirEntry.is_dir`) or a file (`is_file`).

    A link that leads nowhere, to itself for one, is neither; the methods raise an error for most of these.
    """
    try:
        return is_kind(child)
    except OSError as error:
        if child.is_symlink() and error.errno in LEADS_NOWHERE_ERRNOS:
            return False
        raise


def is_named_as_image(name: str) -> bool:
    """Whether a file name has an image suffix."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def may_be_image(name: str) -> bool:
    """Whether a file counts as an image: it has an image suffix, or it has no suffix and is not hidden."""
    suffix = Path(name).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix == "" and not name.startswith("."))
