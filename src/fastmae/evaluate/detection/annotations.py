"""The entries of an annotations file in COCO's format, typed as they are read, and each object checked.

A mask may unfold to much more than its text. It stays text until its turn comes, and is bounded before it is unfolded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from fastmae.errors import InputError, first_line
from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.masks import Segmentation, Size
from fastmae.images.decode import MAX_PIXELS
from fastmae.outside.documents import read_json
from fastmae.runtime.progress import Progress

TOLERANCE = 2.0
"""Pixels by which a box may reach beyond the image (rounding, resized images); it is clipped there."""
CHUNK = 1000
"""Annotations between two updates of the progress; COCO's 860,000 take a minute or two."""
LARGEST_FILE = 2 << 30
"""Most bytes of an annotations file; COCO's largest has 0.5 GB, that of LVIS 1.1 GB."""
MAX_SIDE = 1 << 16
"""Of an image, in pixels."""
SMALLEST_SIDE = 1 / 64
"""Of a box, in pixels. Between coordinates that are much closer than this, float32 would see no difference."""
OUTLINES = 16
"""Largest total of an image's outlines, in lengths of the path that visits each of its pixels."""
SHOWN_DIGITS = 25
"""Of a number, in an error message."""
WAY_OUT = "correct it; COCO's format is an object with the lists images, annotations and categories"


class Category(msgspec.Struct, gc=False):
    """A class of objects."""

    id: int | float
    name: str


class ImageEntry(msgspec.Struct, gc=False):
    """A photo."""

    id: int | float
    file_name: str
    width: int | float
    height: int | float


class Annotation(msgspec.Struct, gc=False):
    """An annotation. Its mask is kept as text until its turn: the polygons of all of COCO would be gigabytes."""

    image_id: int | float
    category_id: int | float
    bbox: tuple[float, float, float, float]
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    id: int | float | str | None = None
    area: float | None = None
    iscrowd: bool | int | float | None = None


class AnnotationsFile(msgspec.Struct):
    """What is read of the file."""

    images: list[ImageEntry]
    annotations: list[Annotation]
    categories: list[Category]


Entry = TypeVar("Entry", ImageEntry, Category)


def read_file(file: Path) -> AnnotationsFile:
    """Read an annotations file.

    Raises:
        InputError: not COCO's format; the message says where.
        OSError: it can't be read.
    """
    return read_json(file, AnnotationsFile, way_out=WAY_OUT, limit=LARGEST_FILE)


def by_id(file: Path, kind: str, entries: Sequence[Entry]) -> dict[int, Entry]:
    """Images or categories by their ids.

    Raises:
        InputError: an id that is not whole, or is given twice.
    """
    ids = [_whole(entry.id, f"{file}: {kind} {index} of its list: its id") for index, entry in enumerate(entries)]
    found = dict(zip(ids, entries, strict=True))
    if len(found) < len(entries):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{file}: two of its {kind} entries have the id {_shown(twice)}; give each its own")
    return found


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


def annotated_size(file: Path, image: ImageEntry) -> Size:
    """(width, height) of an image, as its entry says.

    Raises:
        InputError: a size that no image has, or none that is decoded.
    """
    name = f"{file}: image {image.file_name!r}"
    width, height = _whole(image.width, f"{name}: its width"), _whole(image.height, f"{name}: its height")
    if not (0 < width < MAX_SIDE and 0 < height < MAX_SIDE and width * height <= MAX_PIXELS):
        raise InputError(
            f"{name} has width {_shown(width)} and height {_shown(height)}; give them in pixels, "
            f"at most {MAX_PIXELS >> 20} Mpx in all"
        )
    return width, height


@dataclass(frozen=True)
class Object:
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

    def read(self, annotation: Annotation) -> tuple[int, Object | None]:
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
        area = -1.0 if annotation.area is None else annotation.area
        if not 0 <= area <= 2 * size[0] * size[1]:
            area = masks.area(mask, size)
        return image_id, Object(box, self.labels[category_id], bool(annotation.iscrowd), area, mask)

    def _known(self, where: str, kind: str, number: float, known: Mapping[int, object]) -> int:
        entry_id = _whole(number, f"{where}: its {kind}_id")
        if entry_id not in known:
            raise InputError(
                f"{where}: there is no {kind} {_shown(entry_id)}, its {kind}_id; "
                "remove the annotation, or add that entry"
            )
        return entry_id

    def _mask(self, annotation: Annotation, image_id: int) -> bytes | None:
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


def read_objects(
    file: Path, annotations: Sequence[Annotation], sizes: Mapping[int, Size], labels: Mapping[int, int], progress: str
) -> list[list[Object]]:
    """The checked objects of each image, in the order of the images.

    Args:
        file: for messages.
        annotations: of all images.
        sizes: image id -> size.
        labels: category id -> label.
        progress: first word of the progress line; empty for none.

    Raises:
        InputError: an annotation that is impossible, or no object at all.
    """
    by_image: dict[int, list[Object]] = {image_id: [] for image_id in sizes}
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
