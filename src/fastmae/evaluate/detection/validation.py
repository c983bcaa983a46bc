"""Measures a detector on the validation photos: COCO's average precision, and a picture of some detections."""

import itertools
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.average_precision import Detections, average_precision
from fastmae.evaluate.detection.coco import Split
from fastmae.evaluate.detection.datasets import SizeLimits, ValidationPhotos
from fastmae.evaluate.detection.pictures import choose_images, draw_detections
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process
from fastmae.training.evaluation import val_batches
from fastmae.training.task import Evaluated, Picture


@dataclass(frozen=True)
class Validation:
    """Measures a network; called with the network and Fabric.

    Attributes:
        split: the validation split.
        limits: of the photos' size for the network.
        channels: number of channels that photos are decoded to, 1 or 3.
        value_range: how their values of more than 8 bits become 8 bits.
        workers: number of loading processes; -1 for automatic.
        num_pictures: number of photos that are drawn; 0 for none.
        pictures_file: where they are drawn.
    """

    split: Split
    limits: SizeLimits
    channels: int
    value_range: str
    workers: int
    num_pictures: int
    pictures_file: Path

    def __call__(self, network: nn.Module, fabric: Fabric) -> Evaluated:
        """COCO's figures, the same in every process; see `average_precision`."""
        photos = ValidationPhotos(self.split, self.limits, self.channels, self.value_range)
        # One photo at a time: in a batch, the padding of its feature maps would change a photo's proposals a little.
        samples = val_batches(photos, fabric, 1, self.workers, itemgetter(0))
        detections = [detect_objects(network, self.split, image, photo) for image, photo in samples]
        detections = gather_detections(fabric, detections)
        figures: dict[str, float] = {}

        on_first_process(fabric, lambda: figures.update(average_precision(self.split, detections)))
        picture = Picture(self.pictures_file, lambda: self._draw(detections))
        return Evaluated(fabric.broadcast(figures), [picture] if self.num_pictures else [])

    def _draw(self, detections: list[Detections]) -> bytes:
        images = choose_images(self.split, self.num_pictures)
        return draw_detections(self.split, detections, images, self.channels, self.value_range)


def detect_objects(network: nn.Module, split: Split, image: int, photo: torch.Tensor) -> Detections:
    """The objects in a photo, with boxes and masks at the original image's size.

    Args:
        network: from `build_detector`, in evaluation mode.
        split: the image's split.
        image: index of the image in the split.
        photo: uint8 [K, H, W] on the network's device, the image at its own size or smaller.
    """
    (output,) = network([photo])
    width, height = split.size(image)
    scale = np.array([width / photo.shape[-1], height / photo.shape[-2]] * 2, dtype=np.float32)
    boxes = output["boxes"].float().cpu().numpy() * scale
    box_masks = output["masks"][:, 0].float().cpu()
    return Detections(
        image=image,
        labels=output["labels"].cpu().numpy(),
        scores=output["scores"].float().cpu().numpy(),
        boxes=boxes,
        masks=[masks.paste(mask, box.tolist(), (width, height)) for mask, box in zip(box_masks, boxes, strict=True)],
    )


def gather_detections(fabric: Fabric, detections: list[Detections]) -> list[Detections]:
    """The detections of all processes, sorted by image, in the first process; an empty list in the others."""
    if fabric.world_size == 1:
        return detections
    gathered: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
    torch.distributed.gather_object(detections, gathered)
    if gathered is None:
        return []
    return sorted(itertools.chain(*gathered), key=lambda detected: detected.image)
