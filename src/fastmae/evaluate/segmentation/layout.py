"""A folder of photos and of masks -> pairs of files, the classes' names, and a mask's ids. Two layouts, told apart by their folders.

DATA/images/{train,val}/X.jpg, DATA/masks/{train,val}/X.png, optionally DATA/classes.json
DATA/images/{training,validation}/X.jpg, DATA/annotations/{training,validation}/X.png, optionally DATA/objectInfo150.txt (ADE20K's own)

What the files' contents have to be is checked in `survey`.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmae.errors import InputError, first_line
from fastmae.images.decode import MAX_PIXELS
from fastmae.images.folders import files_below, may_be_image

IGNORED = 255
"""The id of a pixel that counts for nothing; so classes are 0 to 254, and a mask is a byte a pixel."""
ADE_CLASSES = 150
NAMES_FILE, ADE_NAMES_FILE = "classes.json", "objectInfo150.txt"
SPLITS = ("train", "val")
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's names of images with one integer a pixel."""


@dataclass(frozen=True)
class Pair:
    """A photo and its mask.

    Attributes:
        image: its file.
        mask: a PNG of the same size, with a class id a pixel.
    """

    image: Path
    mask: Path


@dataclass(frozen=True)
class Reading:
    """How the numbers in a mask's file become class ids.

    Attributes:
        zero_ignored: 0 is ignored, and k means class k - 1, as in ADE20K.
        ignored: another id than 255 that is ignored, or 255.
    """

    zero_ignored: bool = False
    ignored: int = IGNORED


@dataclass(frozen=True)
class SegmentationData:
    """What DATA holds, by its file names alone.

    Attributes:
        root: DATA.
        train: pairs, sorted.
        val: the same.
        names: of the classes, in the order of their ids; none: only the masks tell how many there are.
        named_in: the file that the names stand in.
        reading: of the masks.
        unused: masks without an image.
    """

    root: Path
    train: list[Pair]
    val: list[Pair]
    names: tuple[str, ...] | None
    named_in: str
    reading: Reading
    unused: int


def find_data(root: Path) -> SegmentationData:
    """Recognise the layout and pair the photos with their masks.

    Raises:
        InputError: no such folder, neither layout, an empty split, an image without a mask, or names that can't be read.
    """
    if not root.is_dir():
        raise InputError(
            f"{root}: {'is a file' if root.exists() else 'does not exist'}; give a folder with images/ and masks/ in it"
        )
    own = (root / "annotations").is_dir() and not (root / "masks").is_dir()
    masks, folders = ("annotations", ("training", "validation")) if own else ("masks", SPLITS)
    for kind in ("images", masks):
        for folder in folders:
            if not (root / kind / folder).is_dir():
                raise InputError(
                    f"{root}: no folder {kind}/{folder}; give images/{{train,val}} with masks/{{train,val}}, "
                    "or ADE20K's images/{training,validation} with annotations/{training,validation}"
                )
    (train, unused), (val, also_unused) = (
        _pairs(root / "images" / folder, root / masks / folder) for folder in folders
    )
    names, named_in, ignored = _names(root, own)
    return SegmentationData(root, train, val, names, named_in, Reading(own, ignored), unused + also_unused)


def read_mask(path: Path, reading: Reading) -> np.ndarray:
    """Class ids of a mask's file, uint8 [H, W], 255 where nothing counts.

    Raises:
        InputError: no image, a damaged one, one with colours instead of ids, or ids over 255.
    """
    try:
        with Image.open(path) as image:
            _check_header(path, image)
            stored = np.asarray(image)
    except InputError:
        raise
    except Exception as error:  # codecs raise nearly any type on damaged files
        raise InputError(f"{path}: damaged, or not an image ({first_line(error)}); write the mask again") from error
    outside = stored[(stored < 0) | (stored > IGNORED)] if stored.dtype.itemsize > 1 else stored[:0]
    if outside.size:
        raise InputError(f"{path}: holds the id {int(outside.flat[0])}; ids are 0 to 254, and {IGNORED} is ignored")
    ids = stored.astype(np.uint8)  # a copy: what Pillow gives is read-only
    if reading.ignored != IGNORED:
        ids[ids == reading.ignored] = IGNORED
    if reading.zero_ignored:
        ids = np.where(ids == IGNORED, IGNORED, ids - np.uint8(1))  # 0 wraps round to 255
    return ids


def mask_size(path: Path) -> tuple[int, int]:
    """(width, height) of a mask, from its header.

    Raises:
        InputError: as `read_mask`, as far as a header tells.
    """
    try:
        with Image.open(path) as image:
            _check_header(path, image)
            return image.size
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: damaged, or not an image ({first_line(error)}); write the mask again") from error


def _check_header(path: Path, image: Image.Image) -> None:
    if image.mode not in ID_MODES:
        raise InputError(
            f"{path}: has colours ({image.mode}), not a class id a pixel; save the ids as a grey or palette PNG (Pillow's mode L or P)"
        )
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise InputError(
            f"{path}: declares {image.size[0]} x {image.size[1]} pixels, more than the {MAX_PIXELS >> 20} Mpx allowed"
        )


def _pairs(images: Path, masks: Path) -> tuple[list[Pair], int]:
    """Pairs in the order of their names, and how many masks have no image."""
    found = sorted(files_below(images, may_be_image))
    if not found:
        raise InputError(f"{images}: no image file in it or below it")
    stems = [str(Path(name).with_suffix("")) for name in found]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise InputError(
            f"{images}: has two images {twice[0]}.* for the one mask {masks / twice[0]}.png; rename or remove one"
        )
    there = {
        str(Path(name).with_suffix("")): name for name in files_below(masks, lambda name: name.lower().endswith(".png"))
    }
    lacking = [(image, stem) for image, stem in zip(found, stems, strict=True) if stem not in there]
    if lacking:
        raise InputError(_lacking(images / lacking[0][0], masks / f"{lacking[0][1]}.png", len(lacking), len(found)))
    return [Pair(images / image, masks / there[stem]) for image, stem in zip(found, stems, strict=True)], len(
        there
    ) - len(found)


def _lacking(image: Path, mask: Path, lacking: int, images: int) -> str:
    other = next((path.name for path in sorted(mask.parent.glob(f"{mask.stem}.*"))), "") if mask.parent.is_dir() else ""
    besides = f"; there is {other}, but only a PNG keeps ids as they are" if other else ""
    return (
        f"{image}: has no mask {mask} ({lacking} of {images} images lack theirs){besides}; add it, or remove the image"
    )


def _names(root: Path, own: bool) -> tuple[tuple[str, ...] | None, str, int]:
    """The classes' names or None, the file's name that they stand in, and the id that is ignored."""
    if (root / NAMES_FILE).is_file():
        names, ignored = _names_from_json(root / NAMES_FILE)
        return names, NAMES_FILE, ignored
    if own and (root / ADE_NAMES_FILE).is_file():
        return _names_from_table(root / ADE_NAMES_FILE), ADE_NAMES_FILE, IGNORED
    if own:
        return tuple(str(number) for number in range(1, ADE_CLASSES + 1)), "ADE20K", IGNORED
    return None, "", IGNORED


def _names_from_json(path: Path) -> tuple[tuple[str, ...], int]:
    """Names from `{"classes": {"0": "sky", ...}, "ignore_index": 255}`, the inner part alone, or a plain list; and the ignored id."""
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON ({first_line(error)})") from error
    named = held.get("classes", held) if isinstance(held, dict) else held
    ignored = held.get("ignore_index", IGNORED) if isinstance(held, dict) else IGNORED
    if isinstance(named, list):
        named = {str(number): name for number, name in enumerate(named)}
    if (
        not isinstance(named, dict)
        or not named
        or set(named) != {str(number) for number in range(len(named))}
        or len(named) > IGNORED
    ):
        raise InputError(
            f'{path}: give the names of the ids 0, 1, 2 and so on without a gap, as {{"classes": {{"0": "sky", "1": "road"}}}}'
        )
    if not isinstance(ignored, int) or not 0 <= ignored <= IGNORED or ignored < len(named):
        raise InputError(f"{path}: ignore_index {ignored}; give a number up to {IGNORED} that no class has")
    return unique_names([str(named[str(number)]) for number in range(len(named))]), ignored


def _names_from_table(path: Path) -> tuple[str, ...]:
    """Names from ADE20K's table: a head line, then an id first and the names, synonyms and all, last."""
    rows = [
        line.split("\t")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line[:1].isdigit()
    ]
    if (
        [row[0].strip() for row in rows] != [str(number) for number in range(1, len(rows) + 1)]
        or not rows
        or len(rows[0]) < 2
    ):
        raise InputError(
            f"{path}: not ADE20K's table of classes (an id first and a name last in each line, tabs between)"
        )
    whole = [row[-1].strip() for row in rows]
    short = [re.split(r"[,;]", name)[0].strip() for name in whole]
    return unique_names([name if short.count(name) == 1 else full for name, full in zip(short, whole, strict=True)])


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with the id behind those that several classes have."""
    return tuple(name if list(names).count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names))
