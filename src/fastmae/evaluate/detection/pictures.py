"""Draws photos with their true objects beside the same photos with the detected ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.average_precision import Detections
from fastmae.evaluate.detection.coco import Split
from fastmae.evaluate.detection.datasets import SizeLimits, load_photo
from fastmae.evaluate.drawing import class_hue, evenly_spaced, label, png_bytes, text_as_it_is
from fastmae.images.value_range import AUTO

DRAWN_SIZE = SizeLimits(320, 480)
MAX_DETECTIONS = 12
"""The best detections of a photo that are drawn at most."""
MIN_RELATIVE_SCORE = 0.5
"""Detections below this share of the photo's best score are not drawn."""
TINT = 0.45
"""Share of its class's colour in a mask's pixels."""
SHADES = ((0.85, 0.95), (0.5, 1.0), (0.9, 0.65))
"""Saturation and value that the objects of a class in a photo take in rotation."""
LUMA = np.array([0.299, 0.587, 0.114])
LABEL_HEIGHT = 14
"""In pixels; a label that would stick out at the top is drawn inside its box."""
PHOTOS_PER_ROW = 2


@dataclass(frozen=True)
class _DrawnObject:
    """An object with its box and mask in pixels of the drawing.

    Attributes:
        label: text beside the box.
        colour: RGB in [0, 1], float [3].
        box: left, top, right, bottom, float [4].
        mask: bool [H, W].
    """

    label: str
    colour: np.ndarray
    box: np.ndarray
    mask: np.ndarray


def choose_images(split: Split, count: int) -> list[int]:
    """Indices of at most `count` images with objects, evenly spaced in the split."""
    return evenly_spaced(np.flatnonzero(np.diff(split.object_starts)).tolist(), count)


@text_as_it_is()
def draw_detections(
    split: Split, detections: Iterable[Detections], images: Sequence[int], channels: int, value_range: str = AUTO
) -> bytes:
    """For each image its true and its detected objects, as a PNG's bytes.

    Args:
        split: the images and their true objects.
        detections: in the images; those in others are not drawn.
        images: indices in the split.
        channels: number of channels that photos are decoded to.
        value_range: how values of more than 8 bits become 8 bits.
    """
    by_image = {detected.image: detected for detected in detections}
    rows, columns = -(-len(images) // PHOTOS_PER_ROW), 2 * PHOTOS_PER_ROW
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.2), layout="constrained")
    for index, image in enumerate(images):
        true_axes, detected_axes = (figure.add_subplot(rows, columns, 2 * index + column) for column in (1, 2))
        photo = _as_rgb(load_photo(split, image, DRAWN_SIZE, channels, value_range).numpy())
        _draw_objects(true_axes, photo, _true_objects(split, image), "truth")
        detected_objects = _detected_objects(split, by_image[image]) if image in by_image else []
        _draw_objects(detected_axes, photo, detected_objects, "detections")
    return png_bytes(figure, dpi=130)


def _true_objects(split: Split, image: int) -> list[_DrawnObject]:
    indices = split.objects_without_crowds(image)
    object_masks = [split.mask(index) for index in indices]
    return _scaled_objects(split, image, split.labels[indices], split.boxes[indices], object_masks, [""] * len(indices))


def _detected_objects(split: Split, detected: Detections) -> list[_DrawnObject]:
    """The best detections, with their scores in the labels."""
    best = np.argsort(-detected.scores)[:MAX_DETECTIONS]
    best = best[detected.scores[best] >= MIN_RELATIVE_SCORE * detected.scores.max(initial=0)]
    object_masks = [detected.masks[index] for index in best]
    scores = [f" {detected.scores[index]:.2f}" for index in best]
    return _scaled_objects(split, detected.image, detected.labels[best], detected.boxes[best], object_masks, scores)


def _scaled_objects(
    split: Split,
    image: int,
    labels: np.ndarray,
    boxes: np.ndarray,
    object_masks: Sequence[bytes],
    label_suffixes: Sequence[str],
) -> list[_DrawnObject]:
    class_names = [label(name) for name in split.classes.values()]
    own_size = split.size(image)
    drawn_size = DRAWN_SIZE.shrink(own_size)
    scale = np.array([drawn_size[0] / own_size[0], drawn_size[1] / own_size[1]] * 2)
    drawn = []
    for index, (class_id, box, mask, suffix) in enumerate(
        zip(labels.tolist(), boxes, object_masks, label_suffixes, strict=True)
    ):
        same_class_before = int((labels[:index] == class_id).sum())
        saturation, value = SHADES[same_class_before % len(SHADES)]
        colour = hsv_to_rgb((class_hue(class_id), saturation, value))
        pixels = masks.decode(mask, own_size, drawn_size).astype(bool)
        drawn.append(_DrawnObject(class_names[class_id - 1] + suffix, colour, box * scale, pixels))
    return drawn


def _as_rgb(photo: np.ndarray) -> np.ndarray:
    """uint8 [K, H, W], K 1 or 3 -> float [H, W, 3] in [0, 1]."""
    return (photo if len(photo) == 3 else np.repeat(photo, 3, axis=0)).transpose(1, 2, 0) / 255


def _draw_objects(axes: Axes, photo: np.ndarray, objects: Sequence[_DrawnObject], title: str) -> None:
    tinted = photo.copy()
    for drawn in sorted(objects, key=lambda drawn: -int(drawn.mask.sum())):  # small ones on top
        tinted[drawn.mask] = (1 - TINT) * tinted[drawn.mask] + TINT * drawn.colour
        tinted[drawn.mask & ~_interior(drawn.mask)] = drawn.colour
    axes.imshow(tinted)
    for drawn in objects:
        left, top, right, bottom = drawn.box
        axes.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=drawn.colour, linewidth=1.2
            )
        )
        is_dark = float(drawn.colour @ LUMA) < 0.5
        axes.text(
            left,
            top,
            drawn.label,
            fontsize=5.5,
            color="white" if is_dark else "black",
            bbox={"facecolor": drawn.colour, "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
            verticalalignment="top" if top < LABEL_HEIGHT else "bottom",
            clip_on=True,
        )
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


def _interior(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask, bool [H, W], whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
