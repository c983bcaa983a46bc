"""Average precision of boxes and masks by COCO's own evaluation (pycocotools' COCOeval)."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastmae.evaluate.detection.coco import Split
from fastmae.runtime.progress import counted_through

SUMMARY = ("", "_50", "_75", "_small", "_medium", "_large")
"""COCOeval's first statistics in their order, as suffixes of `box_ap` and `mask_ap`."""
METRICS = tuple(f"{kind}_ap{suffix}" for kind in ("box", "mask") for suffix in SUMMARY)


@dataclass(frozen=True)
class Detections:
    """The objects detected in one image.

    Attributes:
        image: index of the image in the split.
        labels: int64 [N], from 1.
        scores: float32 [N].
        boxes: float32 [N, 4], left, top, right, bottom in pixels of the original image.
        masks: N masks at the original image's size, as compressed run lengths.
    """

    image: int
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[bytes]


def average_precision(split: Split, detections: Sequence[Detections]) -> dict[str, float]:
    """COCO's figures in percent. Those that no true object counts for (none is small, say) are left out.

    Args:
        split: the true objects. Detections within crowds count neither as right nor as wrong.
        detections: of the split's images; in an image without an entry, nothing was detected.
    """
    figures: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every stage
        truth = _coco(split, list(_true_objects(split)))
        kinds = (("box", "bbox"), ("mask", "segm"))
        for kind, iou_type in counted_through(kinds, "average precision", "kinds", len(kinds)):
            results = list(_results(split, detections, iou_type))
            # loadRes numbers the results and computes their areas; it can't take an empty list.
            evaluation = COCOeval(truth, truth.loadRes(results) if results else _coco(split, []), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for suffix, value in zip(SUMMARY, evaluation.stats[: len(SUMMARY)], strict=True):
                if value >= 0:  # -1 if there is no such object
                    figures[f"{kind}_ap{suffix}"] = round(100 * float(value), 4)
    return figures


def _coco(split: Split, annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    sizes = split.sizes.tolist()
    images = [{"id": image, "width": width, "height": height} for image, (width, height) in enumerate(sizes)]
    categories = [{"id": label, "name": name} for label, name in enumerate(split.classes.values(), 1)]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def _true_objects(split: Split) -> Iterator[dict[str, Any]]:
    for image in range(len(split)):
        for index in split.objects(image):
            yield {
                "id": index + 1,  # COCOeval takes 0 for no match
                "image_id": image,
                "category_id": int(split.labels[index]),
                "bbox": _left_top_width_height(split.boxes[index]),
                "segmentation": _rle(split, image, split.mask(index)),
                "area": float(split.areas[index]),
                "iscrowd": int(split.is_crowd[index]),
            }


def _results(split: Split, detections: Sequence[Detections], iou_type: str) -> Iterator[dict[str, Any]]:
    """Detections in COCO's result format: with a box or a mask, by whose area they are small, medium or large."""
    for detected in detections:
        for label, score, box, mask in zip(
            detected.labels, detected.scores, detected.boxes, detected.masks, strict=True
        ):
            result = {"image_id": detected.image, "category_id": int(label), "score": float(score)}
            if iou_type == "bbox":
                yield {**result, "bbox": _left_top_width_height(box)}
            else:
                yield {**result, "segmentation": _rle(split, detected.image, mask)}


def _left_top_width_height(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


def _rle(split: Split, image: int, counts: bytes) -> dict[str, Any]:
    width, height = split.size(image)
    return {"size": [height, width], "counts": counts}
