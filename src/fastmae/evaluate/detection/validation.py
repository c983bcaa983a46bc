"""Photos through a trained detector: what is found in each, at the photo's own size, gathered from all processes."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.average_precision import Detections
from fastmae.evaluate.detection.coco import Split
from fastmae.runtime.fabric import Fabric


def detections(
    network: nn.Module, split: Split, batches: Iterable[tuple[list[int], list[torch.Tensor]]]
) -> Iterable[Detections]:
    """What is found in each photo.

    Args:
        network: from `build_detector`, in evaluation mode.
        split: whose sizes are the photos' own.
        batches: places in the split, and photos uint8 [K, H, W] on the network's device, at their own size or smaller. By the margins of
            their maps photos touch each other's proposals a little: give one at a time.
    """
    for images, photos in batches:
        for image, photo, found in zip(images, photos, network(photos), strict=True):
            yield _at_own_size(split, image, photo, found)


def _at_own_size(split: Split, image: int, photo: torch.Tensor, found: dict[str, torch.Tensor]) -> Detections:
    size = split.size(image)
    scale = np.array([size[0] / photo.shape[-1], size[1] / photo.shape[-2]] * 2, dtype=np.float32)
    boxes = found["boxes"].float().cpu().numpy() * scale
    over_boxes = found["masks"][:, 0].float().cpu()
    counts = [masks.paste(mask, box.tolist(), size) for mask, box in zip(over_boxes, boxes, strict=True)]
    return Detections(image, found["labels"].cpu().numpy(), found["scores"].float().cpu().numpy(), boxes, counts)


def gathered(fabric: Fabric, found: list[Detections]) -> list[Detections]:
    """The detections of all processes by the places of their images, in the first process; none in the others."""
    if fabric.world_size == 1:
        return found
    parts: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
    torch.distributed.gather_object(found, parts)
    return sorted(itertools.chain(*parts), key=lambda detected: detected.image) if parts is not None else []
