"""What a network says of val's photos, counted against their masks; and some of it drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.evaluate.segmentation.inference import enlarged, sliding_scores, whole_scores
from fastmae.evaluate.segmentation.pictures import Shown, sheet
from fastmae.evaluate.segmentation.datasets import WholePhotos
from fastmae.evaluate.segmentation.mean_iou import intersection_over_union, summary
from fastmae.evaluate.supervised import evaluation_batches
from fastmae.images.views import normalise
from fastmae.runtime.durable import write_whole
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process

CLASS_PREFIX = "iou/"
"""Before a class's name, in the figures of an evaluation."""
SHOWN_SIDE = 800
"""Pixels, about, that a mask's longer side has on the sheet at most."""


@dataclass(frozen=True)
class Validation:
    """How a network is measured; call it with the network.

    Attributes:
        photos: of val.
        names: of the classes.
        mean: by which photos are normalised.
        std: the same.
        patch: side of a patch, in pixels.
        window: side of the windows, in pixels; None: each photo is seen as a whole.
        workers: loading processes.
        pictures: rows of the sheet.
        sheet: its file.
        counter: a `confusion_matrix` of the classes.
    """

    photos: WholePhotos
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int
    window: int | None
    workers: int
    pictures: int
    sheet: Path
    counter: Any

    def __call__(self, network: Any, fabric: Fabric) -> dict[str, float]:
        """Measure: `miou`, `pixel_accuracy` and, for each class, `iou/NAME` (not a number for one that does not occur), in percent."""
        counter = self.counter.to(fabric.device)
        counter.reset()
        if fabric.world_size > 1:
            for statistics in network.buffers():  # batch norms that are not synchronised end a step each with their own
                torch.distributed.broadcast(statistics, src=0)
        images = len(self.photos)
        chosen = set(_spread(range(0, images, fabric.world_size), self.pictures)) if fabric.is_global_zero else set()
        rows = []
        for index, photo, mask in evaluation_batches(self.photos, images, fabric, 1, self.workers, _alone):
            predicted = self.predict(network, photo, tuple(mask.shape))
            counter.update(predicted, mask.long())
            if index in chosen:
                rows.append(_shown(photo, mask, predicted))
        counts = counter.compute()
        on_first_process(fabric, lambda: self._draw(rows))
        ious = intersection_over_union(counts).tolist()
        return {**summary(counts), **{f"{CLASS_PREFIX}{name}": iou for name, iou in zip(self.names, ious, strict=True)}}

    def predict(self, network: Any, photo: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The class of every pixel, int64 [H, W].

        Args:
            network: gives scores of its two heads.
            photo: uint8 [K, h, w].
            size: (H, W) of the answer; scores are brought to it before they are compared.
        """
        images = normalise(photo[None], self.mean, self.std)
        if self.window is None:
            scores = whole_scores(network, images, self.patch)
        else:
            scores = sliding_scores(network, images, self.patch, self.window)
        return enlarged(scores, size).argmax(1)[0]

    def _draw(self, rows: list[Shown]) -> None:
        if rows:
            picture = sheet(rows, self.names)
            write_whole(self.sheet, lambda aside: aside.write_bytes(picture))


def _alone(samples: list[Any]) -> Any:
    """A batch of one: photos differ in size."""
    return samples[0]


def _spread(places: range, count: int) -> list[int]:
    """So many of the places, or all, evenly spread."""
    return [places[int(place)] for place in np.linspace(0, len(places) - 1, min(count, len(places))).round()]


def _shown(photo: torch.Tensor, mask: torch.Tensor, predicted: torch.Tensor) -> Shown:
    colours = photo[[0, 0, 0] if len(photo) < 3 else [0, 1, 2]]  # grey, RGB, or the first three channels
    step = -(-max(mask.shape) // SHOWN_SIDE)
    truth, said = (part[::step, ::step].cpu().numpy().astype(np.uint8) for part in (mask, predicted))
    return Shown(colours.permute(1, 2, 0).cpu().numpy(), truth, said)
