"""A folder of image files, nested or flat, as a source: which files count, and how one is opened. No file's content is read here."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from fastmae.errors import InputError
from fastmae.images.entries import entry_of, key_of

# Fixed here, not asked from Pillow or the system, so that the list does not depend on what is installed.
IMAGE_SUFFIXES = frozenset(
    [
        ".apng",
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".heic",
        ".heif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".npy",
        ".pbm",
        ".pcx",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".psd",
        ".sgi",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
        ".xbm",
        ".xpm",
    ]
)


@dataclass(frozen=True)
class FolderSource:
    """Every image file below a folder; a key is the path relative to it, with `/` between the parts.

    A file counts when its suffix is an image's, or when it has none and is not hidden (its content decides later).
    Links are followed, as long as they don't lead back into a folder that they lie in; hidden folders are passed over.
    """

    path: Path
    kind: ClassVar[str] = "folder"

    def entries(self) -> Iterator[bytes]:
        """An entry an image, in the order in which the system lists them.

        Raises:
            InputError: a name with the byte 1 in it.
        """
        return (entry_of(self.path, name) for name in files_below(self.path, may_be_image))

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image's file.

        Raises:
            InputError: the key leads outside the folder.
            OSError: the file can't be opened.
        """
        key = key_of(entry)
        if key.startswith("/") or ".." in key.split("/"):
            raise InputError(
                f"{self.path}: the list names {key[:80]!r}, outside this folder; it was changed by hand, list the images again"
            )
        return (self.path / key).open("rb")


def files_below(folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Paths relative to `folder` of the files whose name is wanted; links and hidden folders as in `FolderSource`."""
    return _files_below(folder, wanted, "", frozenset())


def _files_below(folder: Path, wanted: Callable[[str], bool], prefix: str, above: frozenset[str]) -> Iterator[str]:
    """The same, each after `prefix`; `above` are the real places of the folders on the way here."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _files_below(Path(entry.path), wanted, f"{prefix}{entry.name}/", above | {here})
            elif wanted(entry.name):
                yield prefix + entry.name


def is_named_as_image(name: str) -> bool:
    """Whether a name ends as images' names do."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def may_be_image(name: str) -> bool:
    """Whether a file counts as an image: by its suffix, or because it has none and is not hidden."""
    suffix = Path(name).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix == "" and not name.startswith("."))
