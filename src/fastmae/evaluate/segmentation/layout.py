"""Finds the photos and masks of a data folder, and the names of its classes. It recognises two layouts:

DATA/images/{train,val}/X.jpg with DATA/masks/{train,val}/X.png, and optionally DATA/classes.json;
ADE20K's own DATA/images/{training,validation}/X.jpg with DATA/annotations/{training,validation}/X.png, and optionally
DATA/objectInfo150.txt.

Photos and masks are not opened here; `data_check` checks their contents.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.masks import IGNORED, MaskEncoding
from fastmae.images.folders import files_below, may_be_image
from fastmae.outside.documents import read_json
from fastmae.outside.regular_file import read_bounded

ADE_CLASSES = 150
NAMES_FILE = "classes.json"
ADE_NAMES_FILE = "objectInfo150.txt"
LARGEST_NAMES_FILE = 1 << 20
"""In bytes."""

NAMES_FORMAT = (
    'give the names of the ids 0, 1, 2 and so on without a gap, as {"classes": {"0": "sky", "1": "road"}}, at most '
    f"{IGNORED}"
)
_Names = dict[str, str | int] | list[str | int]
_NamesFile = dict[str, str | int | _Names] | list[str | int]


@dataclass(frozen=True)
class Pair:
    """The files of a photo and its mask.

    Attributes:
        image: the photo.
        mask: a PNG of the photo's size with a class id for each pixel.
    """

    image: Path
    mask: Path


@dataclass(frozen=True)
class SegmentationData:
    """What a data folder holds, by its file names alone.

    Attributes:
        root: the data folder.
        train: training pairs, sorted by name.
        val: validation pairs, sorted by name.
        class_names: one for each class id; None if only the masks tell how many classes there are.
        names_source: where the names come from; empty if there are none.
        encoding: how the masks store class ids.
        unused_masks: number of masks without a photo.
    """

    root: Path
    train: list[Pair]
    val: list[Pair]
    class_names: tuple[str, ...] | None
    names_source: str
    encoding: MaskEncoding
    unused_masks: int


def find_data(root: Path) -> SegmentationData:
    """Recognise the layout and pair the photos with their masks.

    Raises:
        InputError: no such folder, neither layout, an empty split, a photo without a mask, or unreadable class names.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root}: {problem}; give a folder with images/ and masks/ in it")
    is_ade = (root / "annotations").is_dir() and not (root / "masks").is_dir()
    masks = "annotations" if is_ade else "masks"
    splits = ("training", "validation") if is_ade else ("train", "val")
    for kind in ("images", masks):
        for split in splits:
            if not (root / kind / split).is_dir():
                raise InputError(
                    f"{root}: no folder {kind}/{split}; give images/{{train,val}} with masks/{{train,val}}, "
                    "or ADE20K's images/{training,validation} with annotations/{training,validation}"
                )
    train, unused_in_train = _pairs(root / "images" / splits[0], root / masks / splits[0])
    val, unused_in_val = _pairs(root / "images" / splits[1], root / masks / splits[1])
    names, source, ignored = _class_names(root, is_ade)
    return SegmentationData(
        root, train, val, names, source, MaskEncoding(is_ade, ignored), unused_in_train + unused_in_val
    )


def _pairs(images: Path, masks: Path) -> tuple[list[Pair], int]:
    """Pairs in the order of their names, and the number of masks without a photo."""
    image_names = sorted(files_below(images, may_be_image))
    if not image_names:
        raise InputError(f"{images}: no image file in it or below it")
    stems = [_stem(name) for name in image_names]
    stem, occurrences = Counter(stems).most_common(1)[0]
    if occurrences > 1:
        raise InputError(f"{images}: has two images {stem}.* for the one mask {masks / stem}.png; rename or remove one")
    mask_names = {_stem(name): name for name in files_below(masks, lambda name: name.lower().endswith(".png"))}
    without_mask = [name for name in image_names if _stem(name) not in mask_names]
    if without_mask:
        image, mask = images / without_mask[0], masks / f"{_stem(without_mask[0])}.png"
        raise InputError(
            f"{image}: has no mask {mask} ({len(without_mask)} of {len(image_names)} images lack theirs)"
            f"{_mask_in_another_format(mask)}; add it, or remove the image"
        )
    pairs = [Pair(images / name, masks / mask_names[stem]) for name, stem in zip(image_names, stems, strict=True)]
    return pairs, len(mask_names) - len(pairs)


def _stem(name: str) -> str:
    """A relative path without its suffix."""
    return str(Path(name).with_suffix(""))


def _mask_in_another_format(mask: Path) -> str:
    others = sorted(mask.parent.glob(f"{mask.stem}.*")) if mask.parent.is_dir() else []
    return f"; there is {others[0].name}, but only a PNG keeps ids as they are" if others else ""


def _class_names(root: Path, is_ade: bool) -> tuple[tuple[str, ...] | None, str, int]:
    """The names or None, where they come from, and the id that is ignored."""
    if (root / NAMES_FILE).exists():
        names, ignored = _read_names_json(root / NAMES_FILE)
        return names, NAMES_FILE, ignored
    if not is_ade:
        return None, "", IGNORED
    if (root / ADE_NAMES_FILE).exists():
        return _read_ade_names(root / ADE_NAMES_FILE), ADE_NAMES_FILE, IGNORED
    return tuple(str(number) for number in range(1, ADE_CLASSES + 1)), "ADE20K", IGNORED


def _read_names_json(path: Path) -> tuple[tuple[str, ...], int]:
    """The names and the ignored id.

    The file holds {"classes": {"0": "sky", ...}, "ignore_index": 255}, or the inner object alone, or a list of names.
    """
    content = read_json(path, _NamesFile, way_out=NAMES_FORMAT, limit=LARGEST_NAMES_FILE)
    classes = content.get("classes", content) if isinstance(content, dict) else content
    ignored = content.get("ignore_index", IGNORED) if isinstance(content, dict) else IGNORED
    if isinstance(classes, list):
        classes = {str(class_id): name for class_id, name in enumerate(classes)}
    if (
        not isinstance(classes, dict)
        or not 0 < len(classes) <= IGNORED
        or set(classes) != {str(class_id) for class_id in range(len(classes))}
    ):
        raise InputError(f"{path}: {NAMES_FORMAT}")
    if not isinstance(ignored, int) or not len(classes) <= ignored <= IGNORED:
        raise InputError(f"{path}: ignore_index {ignored}; give a number up to {IGNORED} that is no class's id")
    return _unique([str(classes[str(class_id)]) for class_id in range(len(classes))]), ignored


def _read_ade_names(path: Path) -> tuple[str, ...]:
    """Names from ADE20K's table, whose lines begin with an id and end with the name and its synonyms.

    Only the first synonym is kept where it names one class alone.
    """
    lines = read_bounded(path, LARGEST_NAMES_FILE).decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines if line[:1].isdigit()]  # without the head line
    ids = [row[0].strip() for row in rows]
    if not rows or len(rows[0]) < 2 or ids != [str(number) for number in range(1, len(rows) + 1)]:
        raise InputError(
            f"{path}: not ADE20K's table of classes (an id first and a name last in each line, tabs between)"
        )
    full_names = [row[-1].strip() for row in rows]
    short_names = [re.split(r"[,;]", name)[0].strip() for name in full_names]
    occurrences = Counter(short_names)
    return _unique(
        [short if occurrences[short] == 1 else full for short, full in zip(short_names, full_names, strict=True)]
    )


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names; those that several classes share are followed by the class id."""
    occurrences = Counter(names)
    return tuple(name if occurrences[name] == 1 else f"{name} ({class_id})" for class_id, name in enumerate(names))
