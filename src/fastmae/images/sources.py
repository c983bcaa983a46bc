"""Where pictures come from: a folder, nested or flat, labelled or not.

The list is a function of the folder alone (sorted by path), so that a picture's place in it, its shard and
its row are the same on every machine. Nothing is opened here.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastmae.errors import InputError

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


def list_images(folder: Path) -> list[str]:
    """Every image file below `folder`, as sorted paths relative to it with `/` between the parts.

    A file counts when its suffix is an image's, or when it has none and is not hidden (its content decides later).
    Links are followed, as long as they don't lead back into a folder that they lie in; hidden folders are passed over.

    Raises:
        InputError: `folder` is not a folder, or holds no image file.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {what}; give a folder of images")
    found = sorted(_image_files(folder, "", frozenset()))
    if not found:
        raise InputError(f"{folder}: no image file in it or below it; image suffixes are {_some_suffixes()}")
    return found


def label_of(path: str) -> str:
    """The name of the folder that holds the image (the class, in a labelled tree), or '' at the top level."""
    return Path(path).parent.name


def list_digest(paths: Sequence[str]) -> str:
    """SHA-256 over the list in its order: two lists with one digest hold the same images in the same places."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()


def labelled_split(data: Path, split: str) -> tuple[list[Path], list[str]]:
    """Images and class names of `data/split/<class>/...`, sorted by path.

    Returns:
        The files and, for each, the name of its class (the first folder below the split).

    Raises:
        InputError: the split or its class folders are missing, or a class holds no image.
    """
    root = data / split
    if not root.is_dir():
        raise InputError(f"{data}: no folder '{split}'; labelled data are {data}/train/<class>/* and {data}/val/<class>/*")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{root}: no class folders in it; labelled data are {root}/<class>/*.jpg")
    paths = [path for path in list_images(root) if "/" in path]
    labels = [path.split("/", 1)[0] for path in paths]
    empty = sorted(set(classes) - set(labels))
    if empty:
        raise InputError(f"{root / empty[0]}: no image in this class folder; remove it or fill it")
    return [root / path for path in paths], labels


def _image_files(folder: Path, prefix: str, above: frozenset[str]) -> Iterator[str]:
    """Image files below a folder, each after `prefix`; `above` are the real places of the folders on the way here."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _image_files(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
            elif _is_named_as_image(entry.name):
                yield prefix + entry.name


def _is_named_as_image(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix == "" and not name.startswith("."))


def _some_suffixes() -> str:
    return ".jpg, .png, .webp, .tif, .gif, .bmp and their like"
