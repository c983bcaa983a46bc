"""Average precision of boxes and masks by COCO's own evaluation (pycocotools' COCOeval)."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.coco import Split

SUMMARY = ("", "_50", "_75", "_small", "_medium", "_large")
"""What follows `box_ap` and `mask_ap` in a figure's name, in the order of COCOeval's first statistics."""
METRICS = tuple(f"{kind}_ap{suffix}" for kind in ("box", "mask") for suffix in SUMMARY)


@dataclass(frozen=True)
class Detections:
    """What was found in an image.

    Attributes:
        image: its place in the split.
        labels: int64 [N], from 1.
        scores: float32 [N].
        boxes: float32 [N, 4], left, top, right, bottom in pixels of the image itself.
        counts: the N masks at the image's own size, as run lengths.
    """

    image: int
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    counts: list[bytes]


def average_precision(split: Split, found: Iterable[Detections]) -> dict[str, float]:
    """COCO's figures, in percent; those without any object to find (none is small, say) are left out.

    Args:
        split: the truth, crowds included: what is found in them counts neither for nor against.
        found: for its images; one that is not among them counts as one in which nothing was found.
    """
    found = list(found)
    figures: dict[str, float] = {}
    for kind, measure in (("box", "bbox"), ("mask", "segm")):
        truth, results = _as_coco(split, _true_objects(split)), _as_coco(split, _found_objects(split, found, kind))
        for suffix, value in zip(SUMMARY, _summary(truth, results, measure), strict=True):
            if value >= 0:  # COCO's -1 stands for nothing to find
                figures[f"{kind}_ap{suffix}"] = round(100 * value, 4)
    return figures


def _summary(truth: COCO, results: COCO, measure: str) -> list[float]:
    evaluation = COCOeval(truth, results, measure)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every stage
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[: len(SUMMARY)]]


def _as_coco(split: Split, annotations: list[dict[str, Any]]) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every stage
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": image, "width": split.size(image)[0], "height": split.size(image)[1]}
                for image in range(len(split))
            ],
            "categories": [{"id": label, "name": name} for label, name in enumerate(split.classes.values(), 1)],
            "annotations": [
                {"id": number, **annotation} for number, annotation in enumerate(annotations, 1)
            ],  # 0 would pass for no match
        }
        coco.createIndex()
    return coco


def _true_objects(split: Split) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "category_id": int(split.labels[place]),
            "bbox": _corner_and_size(split.boxes[place]),
            "segmentation": _rle(split, image, split.counts(place)),
            "area": float(split.areas[place]),
            "iscrowd": int(split.crowd[place]),
        }
        for image in range(len(split))
        for place in split.objects(image)
    ]


def _found_objects(split: Split, found: Sequence[Detections], kind: str) -> list[dict[str, Any]]:
    """Of a box its own area says whether it is small; of a mask, the mask's."""
    objects: list[dict[str, Any]] = []
    for found_here in found:
        size = split.size(found_here.image)
        for label, score, box, counts in zip(
            found_here.labels, found_here.scores, found_here.boxes, found_here.counts, strict=True
        ):
            bbox = _corner_and_size(box)
            objects.append(
                {
                    "image_id": found_here.image,
                    "category_id": int(label),
                    "score": float(score),
                    "bbox": bbox,
                    "segmentation": _rle(split, found_here.image, counts),
                    "area": bbox[2] * bbox[3] if kind == "box" else masks.area(counts, size),
                    "iscrowd": 0,
                }
            )
    return objects


def _corner_and_size(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


def _rle(split: Split, image: int, counts: bytes) -> dict[str, Any]:
    width, height = split.size(image)
    return {"size": [height, width], "counts": counts}
