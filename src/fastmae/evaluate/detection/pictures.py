"""Photos with the objects that are in them beside those that were found."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.average_precision import Detections
from fastmae.evaluate.detection.coco import Split
from fastmae.evaluate.detection.masks import Size
from fastmae.evaluate.detection.datasets import Limits, load_photo

mpl.use("agg")

SHOWN = Limits(320, 480)
"""Size at which photos are drawn."""
MOST_SHOWN = 12
"""Detections drawn of a photo: those with the highest scores, and at least half the highest one's."""
TINT = 0.45
"""Share of its class's colour in a mask."""
GOLDEN = 0.618034
"""Part of the circle of hues between two classes that follow each other: so many as there are, none are alike."""
SHADES = ((0.85, 0.95), (0.5, 1.0), (0.9, 0.65))
"""Saturation and value of the first, the second and the third object of a class, and so on in turn."""
LUMA = np.array([0.299, 0.587, 0.114])
TEXT_HEIGHT = 14
"""Pixels; a name that would stick out at the top is written inside its box."""
PAIRS_A_ROW = 2


@dataclass(frozen=True)
class _Drawn:
    """An object as it is drawn: its box and mask in pixels of the drawing."""

    name: str
    colour: np.ndarray
    box: np.ndarray
    mask: np.ndarray


def spread_images(split: Split, count: int) -> list[int]:
    """Places of images with objects, from all over a split."""
    with_objects = np.flatnonzero(np.diff(split.starts))
    return with_objects[
        np.linspace(0, len(with_objects) - 1, min(count, len(with_objects))).round().astype(int)
    ].tolist()


def draw(split: Split, found: Iterable[Detections], images: Sequence[int], channels: int) -> bytes:
    """A PNG: for each image what is in it, and what was found.

    Args:
        split: the images and their true objects.
        found: in those images, and maybe in others.
        images: places in the split.
        channels: to which photos are decoded.
    """
    found_in = {detected.image: detected for detected in found}
    rows = -(-len(images) // PAIRS_A_ROW)
    figure = Figure(figsize=(3.4 * 2 * PAIRS_A_ROW, 2.6 * rows + 0.2), layout="constrained")
    for number, image in enumerate(images):
        pair = [figure.add_subplot(rows, 2 * PAIRS_A_ROW, 2 * number + 1 + column) for column in (0, 1)]
        photo = _as_colours(load_photo(split, image, SHOWN, channels).numpy())
        _draw_objects(pair[0], photo, _true(split, image), "what is there")
        _draw_objects(pair[1], photo, _found(split, found_in[image]) if image in found_in else [], "what is found")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _true(split: Split, image: int) -> list[_Drawn]:
    places = [place for place in split.objects(image) if not split.crowd[place]]
    counts = [split.counts(place) for place in places]
    return _drawn(split, image, split.labels[places], split.boxes[places], counts, [""] * len(places))


def _found(split: Split, detected: Detections) -> list[_Drawn]:
    best = np.argsort(-detected.scores)[:MOST_SHOWN]
    best = best[detected.scores[best] >= 0.5 * detected.scores.max(initial=0)]
    counts = [detected.counts[place] for place in best]
    return _drawn(
        split,
        detected.image,
        detected.labels[best],
        detected.boxes[best],
        counts,
        [f" {detected.scores[p]:.2f}" for p in best],
    )


def _drawn(
    split: Split, image: int, labels: np.ndarray, boxes: np.ndarray, counts: Sequence[bytes], tails: Sequence[str]
) -> list[_Drawn]:
    own, names = split.size(image), list(split.classes.values())
    shown = SHOWN.cut(own)
    scale = _scale(own, shown)
    colours = [_colour(label, int((labels[:place] == label).sum())) for place, label in enumerate(labels.tolist())]
    return [
        _Drawn(names[label - 1] + tail, colour, box * scale, masks.decode(runs, own, shown).astype(bool))
        for label, colour, box, runs, tail in zip(labels, colours, boxes, counts, tails, strict=True)
    ]


def _colour(label: int, number: int) -> np.ndarray:
    """RGB in [0, 1] of the so-manieth object of a class in a photo."""
    saturation, value = SHADES[number % len(SHADES)]
    return hsv_to_rgb((label * GOLDEN % 1, saturation, value))


def _scale(own: Size, shown: Size) -> np.ndarray:
    return np.array([shown[0] / own[0], shown[1] / own[1]] * 2)


def _as_colours(photo: np.ndarray) -> np.ndarray:
    """uint8 [K, H, W] -> float [H, W, 3] in [0, 1]."""
    return (photo if len(photo) == 3 else np.repeat(photo[:1], 3, axis=0)).transpose(1, 2, 0) / 255


def _draw_objects(axes: Axes, photo: np.ndarray, objects: Sequence[_Drawn], title: str) -> None:
    tinted = photo.copy()
    for drawn in sorted(objects, key=lambda drawn: -int(drawn.mask.sum())):  # the small ones on top
        tinted[drawn.mask] = (1 - TINT) * tinted[drawn.mask] + TINT * drawn.colour
        tinted[drawn.mask & ~_inside(drawn.mask)] = drawn.colour
    axes.imshow(tinted)
    for drawn in objects:
        left, top, right, bottom = drawn.box
        axes.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=drawn.colour, linewidth=1.2
            )
        )
        label = {"facecolor": drawn.colour, "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        dark = float(drawn.colour @ LUMA) < 0.5
        above = "top" if top < TEXT_HEIGHT else "bottom"
        axes.text(
            left,
            top,
            drawn.name,
            fontsize=5.5,
            color="white" if dark else "black",
            bbox=label,
            verticalalignment=above,
            clip_on=True,
        )
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


def _inside(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
