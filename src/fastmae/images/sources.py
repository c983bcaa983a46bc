"""Where pictures come from: a folder, a list of paths, tar shards, a saved dataset, told apart by what the path is.

Each gives its images as entries: a key that names an image for good, and where it lies. What order they come in does not
matter, `listing` sorts them; so a picture's place in the list, its shard and its row are the same on every machine.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from fastmae.errors import InputError
from fastmae.images.folders import FolderSource, files_below, is_named_as_image, may_be_image
from fastmae.images.path_lists import LIST_SUFFIXES, ListSource
from fastmae.images.saved_dataset import DatasetSource, is_saved_dataset
from fastmae.images.tar_shards import TarSource, is_compressed_tar, is_tar, refuse_compressed


class Source(Protocol):
    """A set of images, each of which can be opened. Pickles as its path: every process opens its own files.

    Attributes:
        kind: 'folder', 'list', 'tar' or 'datasets'.
        path: what was given, from the root.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102 - described above

    @property
    def path(self) -> Path: ...  # noqa: D102 - described above

    def entries(self) -> Iterator[bytes]:
        """The entry of each image (see `entries`), in any order; a stream.

        Raises:
            InputError: the source is damaged, or not what it seems.
        """
        ...

    def open(self, entry: bytes) -> BinaryIO:
        """An image's content, seekable, at its begin.

        Raises:
            InputError: the entry is none of this source's.
            OSError: it can't be read.
        """
        ...


def open_source(path: Path) -> Source:
    """Recognise a source. Its images are looked for later, by `entries`.

    Raises:
        InputError: nothing is there, or nothing that holds images.
    """
    path = (
        path.resolve() if ".." in path.parts else path.absolute()
    )  # a store keeps it: it must mean the same from everywhere
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise InputError(f"{path}: does not exist; give a folder of images")
    if path.suffix.lower() in LIST_SUFFIXES:
        return ListSource(path)
    if is_compressed_tar(path.name):
        refuse_compressed(path)
    if path.suffix.lower() == ".tar":
        return TarSource(path)
    what = "is one image" if is_named_as_image(path.name) else "is a file of another kind"
    raise InputError(
        f"{path}: {what}; give a folder of images, a .tar, or a list of paths ({', '.join(sorted(LIST_SUFFIXES))})"
    )


def _open_folder(path: Path) -> Source:
    if is_saved_dataset(path):
        return DatasetSource(path)
    if any(_names_in(path, is_named_as_image)):
        return FolderSource(path)
    tars, compressed = (sorted(_names_in(path, wanted)) for wanted in (is_tar, is_compressed_tar))
    if not (tars or compressed):
        return FolderSource(path)
    below = next(files_below(path, is_named_as_image), None)
    if below is not None and tars:
        raise InputError(
            f"{path}: holds tars ({tars[0]}) and loose images ({below}); give a folder with only one of the two in it"
        )
    if compressed and below is None:
        refuse_compressed(path / compressed[0])
    return TarSource(path) if tars else FolderSource(path)


def _names_in(folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if wanted(entry.name) and entry.is_file())


def list_images(folder: Path) -> list[str]:
    """Every image file below `folder` as `FolderSource` finds them, as sorted paths relative to it.

    Raises:
        InputError: `folder` is not a folder, or holds no image file.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {what}; give a folder of images")
    found = sorted(files_below(folder, may_be_image))
    if not found:
        raise InputError(
            f"{folder}: no image file in it or below it; image suffixes are .jpg, .png, .webp, .tif, .gif, .bmp and their like"
        )
    return found


def labelled_split(data: Path, split: str) -> tuple[list[Path], list[str]]:
    """Images and class names of `data/split/<class>/...`, sorted by path.

    Returns:
        The files and, for each, the name of its class (the first folder below the split).

    Raises:
        InputError: the split or its class folders are missing, or a class holds no image.
    """
    root = data / split
    if not root.is_dir():
        raise InputError(
            f"{data}: no folder '{split}'; labelled data are {data}/train/<class>/* and {data}/val/<class>/*"
        )
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{root}: no class folders in it; labelled data are {root}/<class>/*.jpg")
    paths = [path for path in list_images(root) if "/" in path]
    labels = [path.split("/", 1)[0] for path in paths]
    empty = sorted(set(classes) - set(labels))
    if empty:
        raise InputError(f"{root / empty[0]}: no image in this class folder; remove it or fill it")
    return [root / path for path in paths], labels
