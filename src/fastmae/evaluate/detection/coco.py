"""Annotated photos in COCO's format: where they lie, what their file says, and whether that can be true.

All is checked before training starts, and kept in arrays: full COCO's objects as Python's would take gigabytes in every loading
process. Masks stay run lengths until a picture is loaded.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.errors import InputError, first_line
from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.image_check import check_images
from fastmae.evaluate.detection.masks import Size
from fastmae.runtime.progress import Progress

LAYOUTS = (
    "detection data are COCO's own (annotations/instances_{train,val}2017.json with train2017/ and val2017/), "
    "or two folders whose names end in train and val, each with images/ and annotations.json"
)
TOLERANCE = 2.0
"""Pixels by which a box may reach over its image's edge (rounding, and images that were made smaller); it is cut there."""
AT_A_TIME = 1000
"""Annotations read between two looks at the progress; COCO's 860,000 take a minute or two."""
LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class SplitFiles:
    """Where a split lies: its annotations, and the folder to which they name images relatively."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Split:
    """A split's images, and all objects in them, image by image.

    Attributes:
        files: where it lies.
        classes: category id -> name, by rising ids, which may have holes; an object's label is its class's place here, from 1 (0 is
            background).
        names: of the image files.
        sizes: int32 [images, 2], width and height in pixels.
        starts: int64 [images + 1]; image i has the objects starts[i] to starts[i + 1].
        boxes: float32 [objects, 4], left, top, right, bottom in pixels.
        labels: int64 [objects].
        crowd: bool [objects]: a region with many objects of a class, rather than one.
        areas: float32 [objects], in square pixels, by which COCO tells small from large.
        runs: uint8, the masks' run lengths, one behind the other.
        run_starts: int64 [objects + 1], where each begins.
        dropped: objects left out for having no width, no height, or no polygon of three points.
    """

    files: SplitFiles
    classes: dict[int, str]
    names: tuple[str, ...]
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    runs: np.ndarray
    run_starts: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.names)

    def path(self, image: int) -> Path:
        """Of an image file."""
        return self.files.images / self.names[image]

    def size(self, image: int) -> Size:
        """(width, height) of an image, in pixels."""
        width, height = self.sizes[image].tolist()
        return width, height

    def objects(self, image: int) -> range:
        """Places of an image's objects in the arrays."""
        return range(int(self.starts[image]), int(self.starts[image + 1]))

    def counts(self, place: int) -> bytes:
        """An object's mask as run lengths."""
        return self.runs[self.run_starts[place] : self.run_starts[place + 1]].tobytes()

    def trainable(self) -> list[int]:
        """Images to train on: all but those in which crowds alone are annotated, which would pass for background."""
        in_each = np.diff(self.starts)
        usable = np.bincount(np.repeat(np.arange(len(self)), in_each)[~self.crowd], minlength=len(self))
        return np.flatnonzero((usable > 0) | (in_each == 0)).tolist()


def find_splits(data: Path) -> tuple[SplitFiles, SplitFiles]:
    """Recognise the layout of DATA.

    Returns:
        Files of the training and of the validation split.

    Raises:
        InputError: neither layout, or a part of it is missing.
    """
    if not data.is_dir():
        raise InputError(f"{data}: {'is a file' if data.exists() else 'does not exist'}; {LAYOUTS}")
    if (data / "annotations").is_dir():
        found = [
            SplitFiles(data / "annotations" / f"instances_{split}2017.json", data / f"{split}2017")
            for split in ("train", "val")
        ]
    else:
        folders = [_folder_ending_in(data, split) for split in ("train", "val")]
        found = [SplitFiles(folder / "annotations.json", folder / "images") for folder in folders]
    for files in found:
        if not files.annotations.is_file():
            raise InputError(f"{files.annotations}: missing; {LAYOUTS}")
        if not files.images.is_dir():
            raise InputError(f"{files.images}: no such folder, where {files.annotations} has its images; {LAYOUTS}")
    return found[0], found[1]


def _folder_ending_in(data: Path, split: str) -> Path:
    folders = sorted(entry for entry in data.iterdir() if entry.is_dir() and entry.name.endswith(split))
    if len(folders) != 1:
        what = (
            f"has {len(folders)} folders whose names end in '{split}' ({folders[0].name}, {folders[1].name})"
            if folders
            else ""
        )
        raise InputError(f"{data}: {what or f'no folder whose name ends in {split!r}'}; {LAYOUTS}")
    return folders[0]


def read_split(files: SplitFiles, classes: dict[int, str] | None = None, progress: str = "") -> Split:
    """Read a split's annotations, and check them against the image files and themselves.

    Args:
        files: where it lies.
        classes: those of the training split, which this one must keep to; None: its own categories.
        progress: first word of the progress line; empty: none is shown.

    Raises:
        InputError: not COCO's format; an image that is missing or of another size; an annotation that can't be true. Names it.
    """
    content = _read_json(files.annotations)
    categories = _by_id(files.annotations, "category", content["categories"], "name")
    own = {identity: categories[identity]["name"] for identity in sorted(categories)}
    classes = own if classes is None else _checked_classes(files.annotations, own, classes)
    images = _by_id(files.annotations, "image", content["images"], "file_name")
    if not images:
        raise InputError(f"{files.annotations}: names no image; give annotated images")
    sizes = {identity: _size_of(files.annotations, image) for identity, image in images.items()}
    names = tuple(image["file_name"] for image in images.values())
    check_images(files.annotations, [files.images / name for name in names], list(sizes.values()), progress)
    labels = {identity: label for label, identity in enumerate(classes, 1)}
    objects = _read_objects(files.annotations, content["annotations"], sizes, labels, progress)
    return _packed(files, classes, names, list(sizes.values()), objects, len(content["annotations"]))


@dataclass(frozen=True)
class _Object:
    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    area: float
    counts: bytes


def _read_json(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: can't be read as JSON ({first_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in LISTS):
        raise InputError(f"{file}: not COCO annotations; they are an object with the lists {', '.join(LISTS)}")
    return content


def _checked_classes(file: Path, own: dict[int, str], known: dict[int, str]) -> dict[int, str]:
    for identity, name in own.items():
        if known.get(identity) != name:
            there = f"where the id {identity} is {known[identity]!r}" if identity in known else "which lacks it"
            raise InputError(
                f"{file}: its category {identity}, {name!r}, is not one of train's, {there}; give both splits the same categories"
            )
    return known


def _by_id(file: Path, what: str, entries: Sequence[Any], name: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or not isinstance(entry.get(name), str):
            raise InputError(
                f"{file}: {what} {number} of its list has no whole number 'id' or no text {name!r}; COCO's have both"
            )
        if entry["id"] in found:
            raise InputError(f"{file}: two of its {what} entries have the id {entry['id']}; number them anew")
        found[entry["id"]] = entry
    return found


def _size_of(file: Path, image: Mapping[str, Any]) -> Size:
    size: tuple[Any, Any] = image.get("width"), image.get("height")
    if not all(isinstance(side, int) and 0 < side < 1 << 16 for side in size):
        raise InputError(
            f"{file}: image {image['file_name']!r} has width {size[0]} and height {size[1]}; give them in pixels"
        )
    return size


def _read_objects(
    file: Path, annotations: Sequence[Any], sizes: Mapping[int, Size], labels: Mapping[int, int], progress: str
) -> list[list[_Object]]:
    """The objects of each image."""
    objects: dict[int, list[_Object]] = {identity: [] for identity in sizes}
    with Progress(progress, "annotations", len(annotations), quiet=not progress) as shown:
        for first in range(0, len(annotations), AT_A_TIME):
            part = annotations[first : first + AT_A_TIME]
            for annotation in part:
                read = _read_object(file, annotation, sizes, labels)
                if read is not None:
                    objects[annotation["image_id"]].append(read)
            shown.advance(len(part))
    if all(read.crowd for in_image in objects.values() for read in in_image):
        what = f"none of its {len(annotations)} annotations is an object with width and height (crowds don't count)"
        raise InputError(f"{file}: {what if annotations else 'holds no annotation'}; annotate some objects")
    return list(objects.values())


def _read_object(file: Path, annotation: Any, sizes: Mapping[int, Size], labels: Mapping[int, int]) -> _Object | None:
    """An annotation, or None for a degenerate one."""
    if not isinstance(annotation, dict):
        raise InputError(f"{file}: an annotation is not an object but {str(annotation)[:60]!r}")
    name = f"{file}: annotation {annotation.get('id')}"
    for key, known in (("image_id", sizes), ("category_id", labels)):
        value = annotation.get(key)
        if not isinstance(value, int) or value not in known:
            raise InputError(
                f"{name}: there is no {key.removesuffix('_id')} {value!r}, its {key}; remove it, or add what it speaks of"
            )
    size = sizes[annotation["image_id"]]
    box = _checked_box(name, annotation.get("bbox"), size)
    if not annotation.get("segmentation"):
        raise InputError(
            f"{name}: has no segmentation; Mask R-CNN learns from a mask (polygons or RLE) of every object"
        )
    try:
        counts = masks.encode(annotation["segmentation"], size)
    except ValueError as error:
        raise InputError(f"{name}: {error}; correct it, or remove the annotation") from error
    if box is None or counts is None:
        return None
    area = annotation.get("area")
    if not isinstance(area, int | float) or not 0 <= area < math.inf:
        area = masks.area(counts, size)
    return _Object(box, labels[annotation["category_id"]], bool(annotation.get("iscrowd")), float(area), counts)


def _checked_box(name: str, bbox: Any, size: Size) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom), cut at the image's edges; None for a box without width or height."""
    numbers = (
        isinstance(bbox, list)
        and len(bbox) == 4
        and all(isinstance(value, int | float) and math.isfinite(value) for value in bbox)
    )
    if not numbers:
        raise InputError(f"{name}: its bbox is {str(bbox)[:80]}; COCO's is [left, top, width, height] in pixels")
    left, top, width, height = (float(value) for value in bbox)
    if width < 0 or height < 0:
        raise InputError(f"{name}: its bbox {bbox} has a negative size; COCO's is [left, top, width, height] in pixels")
    outside = min(left, top) < -TOLERANCE or left + width > size[0] + TOLERANCE or top + height > size[1] + TOLERANCE
    if outside:
        raise InputError(
            f"{name}: its bbox {bbox} lies outside its image of {size[0]} x {size[1]} pixels; correct or remove it"
        )
    box = max(0.0, left), max(0.0, top), min(float(size[0]), left + width), min(float(size[1]), top + height)
    return box if width and height and box[2] > box[0] and box[3] > box[1] else None


def _packed(
    files: SplitFiles,
    classes: dict[int, str],
    names: tuple[str, ...],
    sizes: list[Size],
    in_images: list[list[_Object]],
    annotations: int,
) -> Split:
    objects = list(itertools.chain(*in_images))
    return Split(
        files=files,
        classes=classes,
        names=names,
        sizes=np.array(sizes, dtype=np.int32),
        starts=_starts(len(in_image) for in_image in in_images),
        boxes=np.array([read.box for read in objects], dtype=np.float32),
        labels=np.array([read.label for read in objects], dtype=np.int64),
        crowd=np.array([read.crowd for read in objects], dtype=bool),
        areas=np.array([read.area for read in objects], dtype=np.float32),
        runs=np.frombuffer(b"".join(read.counts for read in objects), dtype=np.uint8),
        run_starts=_starts(len(read.counts) for read in objects),
        dropped=annotations - len(objects),
    )


def _starts(lengths: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.int64)])
