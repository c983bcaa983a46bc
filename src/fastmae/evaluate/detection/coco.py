"""Reads annotated photos in COCO's format, and checks them against the image files and themselves before training.

pycocotools' reader trusts its file and keeps every annotation as Python objects, which for all of COCO take gigabytes
in each loading process. So this reader is ours: it checks each annotation (`annotations`) and keeps arrays; pycocotools
encodes the masks (`masks`) and evaluates (`average_precision`).
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmae.errors import InputError
from fastmae.evaluate.detection.annotations import annotated_size, by_id, read_file, read_objects
from fastmae.evaluate.detection.image_check import check_images
from fastmae.evaluate.detection.masks import Size

LAYOUTS = (
    "detection data are COCO's own (annotations/instances_{train,val}2017.json with train2017/ and val2017/), "
    "or two folders whose names end in train and val, each with images/ and annotations.json"
)
MAX_CLASSES = 1 << 16


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split.

    Attributes:
        annotations: the JSON file.
        images: the folder that the annotations' file names are relative to.
    """

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Split:
    """The images of a split and their objects, as arrays. Objects are sorted by image.

    Attributes:
        files: the split's files.
        classes: category id -> name, by rising ids. An object's label is its class's position here, counted from 1;
            0 is background.
        file_names: of the images.
        sizes: int32 [images, 2], width and height in pixels.
        object_starts: int64 [images + 1]; image i has the objects object_starts[i] to object_starts[i + 1].
        boxes: float32 [objects, 4], left, top, right, bottom in pixels.
        labels: int64 [objects].
        is_crowd: bool [objects], True for a region with many objects of a class.
        areas: float32 [objects], in square pixels; COCO tells small from large objects by them.
        rle: uint8, the compressed run lengths of all masks, one after the other.
        rle_starts: int64 [objects + 1], where each mask begins in `rle`.
        dropped: number of annotations left out for having no width, no height (less than `SMALLEST_SIDE`), or no
            polygon of three points.
    """

    files: SplitFiles
    classes: dict[int, str]
    file_names: tuple[str, ...]
    sizes: np.ndarray
    object_starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray
    rle: np.ndarray
    rle_starts: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, image: int) -> Path:
        """The file of an image."""
        return self.files.images / self.file_names[image]

    def size(self, image: int) -> Size:
        """(width, height) of an image, in pixels."""
        width, height = self.sizes[image].tolist()
        return width, height

    def objects(self, image: int) -> range:
        """Indices of an image's objects in the arrays."""
        return range(int(self.object_starts[image]), int(self.object_starts[image + 1]))

    def objects_without_crowds(self, image: int) -> list[int]:
        """Indices of the single objects in an image."""
        return [index for index in self.objects(image) if not self.is_crowd[index]]

    def mask(self, index: int) -> bytes:
        """An object's mask as compressed run lengths."""
        return self.rle[self.rle_starts[index] : self.rle_starts[index + 1]].tobytes()

    def trainable_images(self) -> list[int]:
        """All images but those annotated with crowds alone, whose objects would pass for background."""
        num_objects = np.diff(self.object_starts)
        image_of_object = np.repeat(np.arange(len(self)), num_objects)
        num_single_objects = np.bincount(image_of_object[~self.is_crowd], minlength=len(self))
        return np.flatnonzero((num_single_objects > 0) | (num_objects == 0)).tolist()


def find_splits(data: Path) -> tuple[SplitFiles, SplitFiles]:
    """Recognise the layout of a data folder.

    Returns:
        The files of the training and of the validation split.

    Raises:
        InputError: neither layout, or a part of it is missing.
    """
    if not data.is_dir():
        raise InputError(f"{data}: {'is a file' if data.exists() else 'does not exist'}; {LAYOUTS}")
    if (data / "annotations").is_dir():
        splits = [
            SplitFiles(data / "annotations" / f"instances_{split}2017.json", data / f"{split}2017")
            for split in ("train", "val")
        ]
    else:
        folders = [_folder_ending_in(data, split) for split in ("train", "val")]
        splits = [SplitFiles(folder / "annotations.json", folder / "images") for folder in folders]
    for files in splits:
        if not files.annotations.exists():
            raise InputError(f"{files.annotations}: missing; {LAYOUTS}")
        if not files.images.is_dir():
            raise InputError(f"{files.images}: no such folder, where {files.annotations} has its images; {LAYOUTS}")
    return splits[0], splits[1]


def _folder_ending_in(data: Path, split: str) -> Path:
    folders = sorted(entry for entry in data.iterdir() if entry.is_dir() and entry.name.endswith(split))
    if not folders:
        raise InputError(f"{data}: no folder whose name ends in {split!r}; {LAYOUTS}")
    if len(folders) > 1:
        first_two = f"{folders[0].name}, {folders[1].name}"
        raise InputError(f"{data}: has {len(folders)} folders whose names end in {split!r} ({first_two}); {LAYOUTS}")
    return folders[0]


def read_split(files: SplitFiles, classes: dict[int, str] | None = None, progress: str = "") -> Split:
    """Read a split's annotations, and check them against the image files and themselves.

    Args:
        files: the split's files.
        classes: the training split's, which a validation split must keep to; None takes the split's own categories.
        progress: first word of the progress lines; empty for none.

    Raises:
        InputError: not COCO's format, an image that is missing or of another size, or an impossible annotation.
    """
    content = read_file(files.annotations)
    categories = by_id(files.annotations, "category", content.categories)
    own_classes = {category_id: categories[category_id].name for category_id in sorted(categories)}
    if len(own_classes) > MAX_CLASSES:
        raise InputError(f"{files.annotations}: has {len(own_classes)} categories, more than the {MAX_CLASSES} allowed")
    if classes is None:
        classes = own_classes
    else:
        _check_same_classes(files.annotations, own_classes, classes)
    images = by_id(files.annotations, "image", content.images)
    if not images:
        raise InputError(f"{files.annotations}: names no image; give annotated images")
    sizes = {image_id: annotated_size(files.annotations, image) for image_id, image in images.items()}
    file_names = tuple(image.file_name for image in images.values())
    check_images(files.annotations, [files.images / name for name in file_names], list(sizes.values()), progress)
    labels = {category_id: label for label, category_id in enumerate(classes, 1)}
    objects_by_image = read_objects(files.annotations, content.annotations, sizes, labels, progress)
    objects = list(itertools.chain(*objects_by_image))
    return Split(
        files=files,
        classes=classes,
        file_names=file_names,
        sizes=np.array(list(sizes.values()), dtype=np.int32),
        object_starts=_starts(len(image_objects) for image_objects in objects_by_image),
        boxes=np.array([annotated.box for annotated in objects], dtype=np.float32),
        labels=np.array([annotated.label for annotated in objects], dtype=np.int64),
        is_crowd=np.array([annotated.is_crowd for annotated in objects], dtype=bool),
        areas=np.array([annotated.area for annotated in objects], dtype=np.float32),
        rle=np.frombuffer(b"".join(annotated.mask for annotated in objects), dtype=np.uint8),
        rle_starts=_starts(len(annotated.mask) for annotated in objects),
        dropped=len(content.annotations) - len(objects),
    )


def _starts(lengths: Iterable[int]) -> np.ndarray:
    """int64 [n + 1]: where each of n joined pieces begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.int64)])


def _check_same_classes(file: Path, own_classes: dict[int, str], train_classes: dict[int, str]) -> None:
    for category_id, name in own_classes.items():
        if train_classes.get(category_id) != name:
            in_train = (
                f"where the id {category_id} is {train_classes[category_id]!r}"
                if category_id in train_classes
                else "which lacks it"
            )
            raise InputError(
                f"{file}: its category {category_id}, {name!r}, is not one of train's, {in_train}; "
                "give both splits the same categories"
            )
