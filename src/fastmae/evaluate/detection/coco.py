"""Reads annotated photos in COCO's format, and checks them against the image files and themselves before training.

pycocotools' reader trusts its file and keeps every annotation as Python objects, which for all of COCO take gigabytes
in each loading process. So this reader is ours: it checks each annotation and keeps arrays; pycocotools encodes the
masks (`masks`) and evaluates (`average_precision`).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from fastmae.errors import InputError, first_line
from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.image_check import check_images
from fastmae.evaluate.detection.masks import Segmentation, Size
from fastmae.images.decode import MAX_PIXELS
from fastmae.outside.documents import read_json
from fastmae.runtime.progress import Progress

LAYOUTS = (
    "detection data are COCO's own (annotations/instances_{train,val}2017.json with train2017/ and val2017/), "
    "or two folders whose names end in train and val, each with images/ and annotations.json"
)
TOLERANCE = 2.0
"""Pixels by which a box may reach beyond the image (rounding, resized images); it is clipped there."""
CHUNK = 1000
"""Annotations between two updates of the progress; COCO's 860,000 take a minute or two."""
LARGEST_FILE = 2 << 30
"""Most bytes of an annotations file; COCO's largest has 0.5 GB, that of LVIS 1.1 GB."""
MAX_SIDE = 1 << 16
"""Of an image, in pixels."""
MAX_CLASSES = 1 << 16
SMALLEST_SIDE = 1 / 64
"""Of a box, in pixels. Between coordinates that are much closer than this, float32 would see no difference."""
OUTLINES = 16
"""Largest total of an image's outlines, in lengths of the path that visits each of its pixels."""
SHOWN_DIGITS = 25
"""Of a number, in an error message."""
WAY_OUT = "correct it; COCO's format is an object with the lists images, annotations and categories"


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split.

    Attributes:
        annotations: the JSON file.
        images: the folder that the annotations' file names are relative to.
    """

    annotations: Path
    images: Path


class _Category(msgspec.Struct, gc=False):
    id: int | float
    name: str


class _Image(msgspec.Struct, gc=False):
    id: int | float
    file_name: str
    width: int | float
    height: int | float


class _Annotation(msgspec.Struct, gc=False):
    """An annotation. Its mask is kept as text until its turn: the polygons of all of COCO would be gigabytes."""

    image_id: int | float
    category_id: int | float
    bbox: tuple[float, float, float, float]
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    id: int | float | str | None = None
    area: float | None = None
    iscrowd: bool | int | float | None = None


class _Content(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


Entry = TypeVar("Entry", _Image, _Category)


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
    content = read_json(files.annotations, _Content, way_out=WAY_OUT, limit=LARGEST_FILE)
    categories = _by_id(files.annotations, "category", content.categories)
    own_classes = {category_id: categories[category_id].name for category_id in sorted(categories)}
    if len(own_classes) > MAX_CLASSES:
        raise InputError(f"{files.annotations}: has {len(own_classes)} categories, more than the {MAX_CLASSES} allowed")
    if classes is None:
        classes = own_classes
    else:
        _check_same_classes(files.annotations, own_classes, classes)
    images = _by_id(files.annotations, "image", content.images)
    if not images:
        raise InputError(f"{files.annotations}: names no image; give annotated images")
    sizes = {image_id: _annotated_size(files.annotations, image) for image_id, image in images.items()}
    file_names = tuple(image.file_name for image in images.values())
    check_images(files.annotations, [files.images / name for name in file_names], list(sizes.values()), progress)
    labels = {category_id: label for label, category_id in enumerate(classes, 1)}
    objects_by_image = _read_objects(files.annotations, content.annotations, sizes, labels, progress)
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


def _by_id(file: Path, kind: str, entries: Sequence[Entry]) -> dict[int, Entry]:
    """Images or categories by their ids."""
    ids = [_whole(entry.id, f"{file}: {kind} {index} of its list: its id") for index, entry in enumerate(entries)]
    by_id = dict(zip(ids, entries, strict=True))
    if len(by_id) < len(entries):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{file}: two of its {kind} entries have the id {_shown(twice)}; give each its own")
    return by_id


def _whole(number: float, name: str) -> int:
    """A number that JSON may hold as 18 or as 18.0.

    Raises:
        InputError: it is not whole.
    """
    if number != int(number):
        raise InputError(f"{name} is {number}; give a whole number")
    return int(number)


def _shown(number: int) -> str:
    """A number of any length, for a message."""
    digits = str(number)
    return digits if len(digits) <= SHOWN_DIGITS else f"{digits[:SHOWN_DIGITS]}..."


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


def _annotated_size(file: Path, image: _Image) -> Size:
    name = f"{file}: image {image.file_name!r}"
    width, height = _whole(image.width, f"{name}: its width"), _whole(image.height, f"{name}: its height")
    if not (0 < width < MAX_SIDE and 0 < height < MAX_SIDE and width * height <= MAX_PIXELS):
        raise InputError(
            f"{name} has width {_shown(width)} and height {_shown(height)}; give them in pixels, "
            f"at most {MAX_PIXELS >> 20} Mpx in all"
        )
    return width, height


@dataclass(frozen=True)
class _Object:
    """A checked annotation. `box` is (left, top, right, bottom)."""

    box: tuple[float, float, float, float]
    label: int
    is_crowd: bool
    area: float
    mask: bytes


@dataclass
class _Reader:
    """Reads the annotations of a file, one after the other.

    Attributes:
        file: for messages.
        sizes: of the images, by their ids.
        labels: of the categories, by their ids.
        outlines: image id -> what its polygons have been so far, see `masks.outline`.
    """

    file: Path
    sizes: Mapping[int, Size]
    labels: Mapping[int, int]
    outlines: Counter[int] = field(default_factory=Counter)
    segmentation = msgspec.json.Decoder(Segmentation | None)

    def read(self, annotation: _Annotation) -> tuple[int, _Object | None]:
        """The image's id and the checked object; None if it has no width, no height or no polygon of three points."""
        where = f"{self.file}: annotation {annotation.id}"
        image_id = self._known(where, "image", annotation.image_id, self.sizes)
        category_id = self._known(where, "category", annotation.category_id, self.labels)
        size = self.sizes[image_id]
        box = _clipped_box(where, annotation.bbox, size)
        try:
            mask = self._mask(annotation, image_id)
        except (ValueError, RecursionError, OverflowError) as error:
            raise InputError(f"{where}: {first_line(error)}; correct it, or remove the annotation") from None
        if box is None or mask is None:
            return image_id, None
        area = annotation.area if annotation.area is not None and annotation.area >= 0 else masks.area(mask, size)
        return image_id, _Object(box, self.labels[category_id], bool(annotation.iscrowd), area, mask)

    def _known(self, where: str, kind: str, number: float, known: Mapping[int, object]) -> int:
        entry_id = _whole(number, f"{where}: its {kind}_id")
        if entry_id not in known:
            raise InputError(
                f"{where}: there is no {kind} {_shown(entry_id)}, its {kind}_id; "
                "remove the annotation, or add that entry"
            )
        return entry_id

    def _mask(self, annotation: _Annotation, image_id: int) -> bytes | None:
        """The mask, as run lengths.

        Raises:
            ValueError: not a mask of the image, or one that no image has.
        """
        try:
            segmentation = self.segmentation.decode(annotation.segmentation)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its segmentation is neither polygons nor an RLE ({first_line(error)})") from None
        if not segmentation:
            raise ValueError("has no segmentation; Mask R-CNN learns from a mask (polygons or RLE) of every object")
        width, height = size = self.sizes[image_id]
        outline = masks.outline(segmentation, size)
        self.outlines[image_id] += int(outline)
        if outline > masks.LONGEST_OUTLINE or self.outlines[image_id] > OUTLINES * (width + 2) * (height + 2):
            raise ValueError(
                f"its polygons are {outline:.3g} pixels long, those of its image so far "
                f"{self.outlines[image_id]:.3g}, in an image of {width} x {height}"
            )
        return masks.encode(segmentation, size)


def _read_objects(
    file: Path, annotations: Sequence[_Annotation], sizes: Mapping[int, Size], labels: Mapping[int, int], progress: str
) -> list[list[_Object]]:
    """The objects of each image."""
    by_image: dict[int, list[_Object]] = {image_id: [] for image_id in sizes}
    reader = _Reader(file, sizes, labels)
    with Progress(progress, "annotations", len(annotations), quiet=not progress) as bar:
        for start in range(0, len(annotations), CHUNK):
            chunk = annotations[start : start + CHUNK]
            for annotation in chunk:
                image_id, annotated = reader.read(annotation)
                if annotated is not None:
                    by_image[image_id].append(annotated)
            bar.advance(len(chunk))
    if not annotations:
        raise InputError(f"{file}: holds no annotation; annotate some objects")
    if all(annotated.is_crowd for objects in by_image.values() for annotated in objects):
        raise InputError(
            f"{file}: none of its {len(annotations)} annotations is an object with width and height "
            "(crowds don't count); annotate some objects"
        )
    return list(by_image.values())


def _clipped_box(
    where: str, bbox: tuple[float, float, float, float], size: Size
) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom), clipped to the image; None for a box without width or height."""
    left, top, width, height = bbox
    if width < 0 or height < 0:
        raise InputError(
            f"{where}: its bbox {[*bbox]} has a negative size; COCO's is [left, top, width, height] in pixels"
        )
    right, bottom = left + width, top + height
    if min(left, top) < -TOLERANCE or right > size[0] + TOLERANCE or bottom > size[1] + TOLERANCE:
        raise InputError(
            f"{where}: its bbox {[*bbox]} lies outside its image of {size[0]} x {size[1]} pixels; correct or remove it"
        )
    left, top, right, bottom = max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom)
    return (left, top, right, bottom) if min(right - left, bottom - top) >= SMALLEST_SIDE else None
