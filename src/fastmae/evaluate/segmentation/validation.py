"""Measures a network on the validation photos: mIoU, pixel accuracy, and a picture of some predictions."""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.evaluate.drawing import evenly_spaced
from fastmae.evaluate.segmentation.datasets import WholePhotos
from fastmae.evaluate.segmentation.inference import resize_scores, sliding_scores, whole_scores
from fastmae.evaluate.segmentation.mean_iou import intersection_over_union, miou_and_accuracy
from fastmae.evaluate.segmentation.pictures import Prediction, draw_predictions
from fastmae.images.views import PixelScale
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import take_first_buffers
from fastmae.training.evaluation import val_batches
from fastmae.training.task import Evaluated, Picture

CLASS_PREFIX = "iou/"
"""Stands before a class's name in the figures of an evaluation."""
MAX_DRAWN_SIDE = 800
"""Upper limit of a drawn mask's longer side, in pixels."""


@dataclass(frozen=True)
class Validation:
    """Measures a network; called with the network and Fabric.

    Attributes:
        photos: the validation photos and masks.
        class_names: one for each class id.
        pixel_scale: normalises the photos.
        patch_size: side of a patch, in pixels.
        window: side of the sliding windows, in pixels; None for one forward pass of the whole photo.
        workers: number of loading processes; -1 for automatic.
        num_pictures: number of photos that are drawn; 0 for none.
        pictures_file: where they are drawn.
        confusion_matrix: from `mean_iou.confusion_matrix`.
    """

    photos: WholePhotos
    class_names: tuple[str, ...]
    pixel_scale: PixelScale
    patch_size: int
    window: int | None
    workers: int
    num_pictures: int
    pictures_file: Path
    confusion_matrix: Any

    def __call__(self, network: Any, fabric: Fabric) -> Evaluated:
        """`miou`, `pixel_accuracy` and `iou/NAME` of each class (NaN if it does not occur), in percent."""
        confusion = self.confusion_matrix.to(fabric.device)
        confusion.reset()
        take_first_buffers(network, fabric)
        share = range(0, len(self.photos), fabric.world_size)  # of the first process, which draws
        drawn = set(evenly_spaced(share, self.num_pictures)) if fabric.is_global_zero else set()
        predictions = []
        # Photos differ in size, so each is a batch of its own.
        samples = val_batches(self.photos, fabric, 1, self.workers, itemgetter(0))
        for index, photo, mask in samples:
            predicted = self.predict(network, photo, (mask.shape[0], mask.shape[1]))
            confusion.update(predicted, mask.long())
            if index in drawn:
                predictions.append(_to_draw(photo, mask, predicted))
        matrix = confusion.compute()
        ious = zip(self.class_names, intersection_over_union(matrix).tolist(), strict=True)
        figures = {**miou_and_accuracy(matrix), **{f"{CLASS_PREFIX}{name}": iou for name, iou in ious}}
        picture = Picture(self.pictures_file, lambda: draw_predictions(predictions, self.class_names))
        return Evaluated(figures, [picture] if predictions else [])

    def predict(self, network: Any, photo: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The class of every pixel, int64 [H, W].

        Args:
            network: gives the scores of its two heads.
            photo: uint8 [K, h, w].
            size: (H, W); the scores are resized to it before the classes are compared.
        """
        images = self.pixel_scale(photo[None])
        if self.window is None:
            scores = whole_scores(network, images, self.patch_size)
        else:
            scores = sliding_scores(network, images, self.patch_size, self.window)
        return resize_scores(scores, size).argmax(1)[0]


def _to_draw(photo: torch.Tensor, mask: torch.Tensor, predicted: torch.Tensor) -> Prediction:
    """One row of the picture, on the CPU, the masks thinned out to `MAX_DRAWN_SIDE`."""
    channels = [0, 0, 0] if len(photo) < 3 else [0, 1, 2]  # grey, RGB, or the first three of several
    step = -(-max(mask.shape) // MAX_DRAWN_SIDE)
    true_ids, predicted_ids = (ids[::step, ::step].cpu().numpy().astype(np.uint8) for ids in (mask, predicted))
    return Prediction(photo[channels].permute(1, 2, 0).cpu().numpy(), true_ids, predicted_ids)
