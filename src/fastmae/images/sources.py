"""Where images come from: a folder, a list of paths, tar shards or a saved dataset, recognised by what the path is.

A source gives its images as entries, in any order: `image_list` sorts them. So an image's index in the list, its shard
and its row are the same on every machine.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from fastmae.errors import InputError
from fastmae.images.folders import FolderSource, files_below, is_named_as_image, leads_to, may_be_image
from fastmae.images.path_lists import LIST_SUFFIXES, ListSource
from fastmae.images.saved_dataset import DatasetSource, is_saved_dataset
from fastmae.images.tar_shards import TarSource, is_compressed_tar, is_tar, refuse_compressed


class Source(Protocol):
    """A set of images, each of which can be opened. It pickles as its path: each process opens its own files.

    Attributes:
        kind: 'folder', 'list', 'tar' or 'datasets'.
        path: absolute path of the source.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102 - described above

    @property
    def path(self) -> Path: ...  # noqa: D102 - described above

    def entries(self) -> Iterator[bytes]:
        """A stream with the entry of each image (see `entries.py`), in any order.

        Raises:
            InputError: the source is damaged, or of another kind than it seemed.
        """
        ...

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image, seekable, positioned at its start.

        Raises:
            InputError: the entry does not belong to this source.
            OSError: the image can't be read.
        """
        ...


def open_source(path: Path) -> Source:
    """Recognise a source. Its images are listed later, by `entries`.

    Raises:
        InputError: the path does not exist, or can't hold images.
    """
    # A store keeps the path, so it must mean the same from any working directory.
    path = path.resolve() if ".." in path.parts else path.absolute()
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
    problem = "is one image" if is_named_as_image(path.name) else "is a file of another kind"
    raise InputError(
        f"{path}: {problem}; give a folder of images, a .tar, or a list of paths ({', '.join(sorted(LIST_SUFFIXES))})"
    )


def _open_folder(path: Path) -> Source:
    """A saved dataset, loose images or tars; tars count only if no image lies directly beside them."""
    if is_saved_dataset(path):
        return DatasetSource(path)
    if any(_file_names(path, is_named_as_image)):
        return FolderSource(path)
    tars, compressed_tars = sorted(_file_names(path, is_tar)), sorted(_file_names(path, is_compressed_tar))
    if not (tars or compressed_tars):
        return FolderSource(path)
    loose_image = next(files_below(path, is_named_as_image), None)
    if loose_image is not None and tars:
        raise InputError(
            f"{path}: holds tars ({tars[0]}) and loose images ({loose_image}); "
            "give a folder with only one of the two in it"
        )
    if compressed_tars and loose_image is None:
        refuse_compressed(path / compressed_tars[0])
    return TarSource(path) if tars else FolderSource(path)


def _file_names(folder: Path, matches: Callable[[str], bool]) -> Iterator[str]:
    with os.scandir(folder) as children:
        yield from (child.name for child in children if matches(child.name) and leads_to(child, os.DirEntry.is_file))


def list_images(folder: Path) -> list[str]:
    """Sorted paths, relative to `folder`, of the image files that `FolderSource` finds in it.

    Raises:
        InputError: `folder` is not a folder, or holds no image file.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {problem}; give a folder of images")
    paths = sorted(files_below(folder, may_be_image))
    if not paths:
        raise InputError(
            f"{folder}: no image file in it or below it; "
            "image suffixes are .jpg, .png, .webp, .tif, .gif, .bmp and the like"
        )
    return paths


def labelled_split(data: Path, split: str) -> tuple[list[Path], list[str]]:
    """Images and class names of `data/split/<class>/...`, sorted by path.

    Returns:
        The image files, and for each the name of its class (the first folder below the split).

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
    class_names = [path.split("/", 1)[0] for path in paths]
    empty = sorted(set(classes) - set(class_names))
    if empty:
        raise InputError(f"{root / empty[0]}: no image in this class folder; remove it or fill it")
    return [root / path for path in paths], class_names


def class_indices(class_names: Sequence[str], classes: Sequence[str]) -> torch.Tensor:
    """The labels of images: the index of each image's class name among the classes.

    Args:
        class_names: class name of each image, N.
        classes: all class names, each once.

    Returns:
        int64 [N].

    Raises:
        KeyError: a class name is not among the classes.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    return torch.tensor([index_of[name] for name in class_names], dtype=torch.int64)
