"""`pretrain --knn-every`: the k-NN accuracy of the encoder while it trains, on labelled images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.images.sources import class_indices
from fastmae.pretraining.plan import Plan
from fastmae.pretraining.predictions import predictions_png
from fastmae.probes.embed import WholeImages, embed_images, embed_with_encoder
from fastmae.probes.labelled import open_labelled
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runtime.fabric import Fabric
from fastmae.student.student import build_student
from fastmae.tokens import TokenStore
from fastmae.training.state import WHOLE
from fastmae.training.task import Evaluated, Picture

MAX_IMAGES = 5000
"""Maximum number of a store's images that are used, spread over all of it: a measurement should take seconds."""
HELD_OUT = 5
"""One in so many images of a store is classified by the votes of the others."""
BATCH_SIZE = 64
"""Images per forward pass."""
PREDICTIONS_FILE = "predictions.png"
PICTURED_IMAGES = 6


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images in two parts: those that vote (train) and those that are classified (val).

    Attributes:
        train: gives uint8 [K, S, S].
        train_labels: int64 [len(train)].
        val: gives uint8 [K, S, S].
        val_labels: int64 [len(val)].
        classes: number of classes.
    """

    train: Dataset[torch.Tensor]
    train_labels: torch.Tensor
    val: Dataset[torch.Tensor]
    val_labels: torch.Tensor
    classes: int


class CentreViews(Dataset[torch.Tensor]):
    """The central views of a store's images, uint8 [K, S, S].

    Args:
        store: the token store.
        indices: the images' numbers in the store.
        size: S, in pixels.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray, size: int):
        self.store, self.indices = store, indices
        self.patches = size // store.info.patch_size
        self.first = (store.grid - self.patches) // 2

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.view_pixels(int(self.indices[index]), self.first, self.first, self.patches)


def labelled_images(data: Path | None, store: TokenStore, size: int) -> LabelledImages:
    """The images to measure on: those of a labelled folder, or the store's own, labelled by the names of their folders.

    Args:
        data: folder with train/<class>/* and val/<class>/*; None: the store's images.
        store: the run's store.
        size: side of the embedded images, in pixels.

    Raises:
        InputError: the store's images lie in one folder, or the data can't be used.
    """
    if data is not None:
        labelled = open_labelled(data)
        train, val = (
            WholeImages(paths, size, store.info.resize, store.info.channels, store.info.value_range)
            for paths in (labelled.train, labelled.val)
        )
        return LabelledImages(train, labelled.train_labels, val, labelled.val_labels, len(labelled.classes))
    spread = np.linspace(0, len(store) - 1, min(len(store), MAX_IMAGES))
    indices = np.unique(spread.round().astype(np.int64))
    folders = [Path(store.key(int(index))).parent.name for index in indices]
    classes = sorted(set(folders))
    if len(classes) < 2:
        raise InputError(
            f"--knn-every: the images of {store.location} lie in one folder and have no labels; give --knn-data"
        )
    labels = class_indices(folders, classes)
    held_out = np.arange(len(indices)) % HELD_OUT == 0
    is_val = torch.from_numpy(held_out)
    train_views, val_views = CentreViews(store, indices[~held_out], size), CentreViews(store, indices[held_out], size)
    return LabelledImages(train_views, labels[~is_val], val_views, labels[is_val], len(classes))


class StudentKnn:
    """Measures a student: its encoder's k-NN top-1 and top-5 accuracy, in percent. Draws what it predicts, too.

    The first process measures while the others wait. The run was saved before, and the picture is of what was saved.

    Args:
        config: the run's options.
        plan: the run's plan.

    Raises:
        InputError: images without labels.
    """

    def __init__(self, config: PretrainConfig, plan: Plan):
        self.config, self.plan = config, plan
        self.images = labelled_images(config.knn_data, plan.stores[0][0], config.image_size)
        store = plan.stores[0][-1]
        images = min(PICTURED_IMAGES, len(store))
        self.picture = Picture(
            config.run / PREDICTIONS_FILE, partial(predictions_png, config.run, store, images, config.seed)
        )

    def __call__(self, student: nn.Module, fabric: Fabric) -> Evaluated:
        """`knn_top1` and `knn_top5`, the same in every process."""
        if any(isinstance(weight, DTensor) for weight in student.parameters()):
            student = self._unsharded(student, fabric)
        accuracy = self._accuracy(student, fabric.device) if fabric.is_global_zero else {}
        return Evaluated(fabric.broadcast(accuracy), [self.picture] if fabric.is_global_zero else [])

    def _unsharded(self, student: nn.Module, fabric: Fabric) -> nn.Module:
        """A copy with whole weights in the first process. Every process takes part."""
        weights = get_model_state_dict(student, options=WHOLE)
        plan = self.plan
        unsharded = build_student(self.config, plan.patch_size, plan.target_dim, plan.channels).to(fabric.device).eval()
        if fabric.is_global_zero:
            unsharded.load_state_dict(weights)
        return unsharded

    def _accuracy(self, student: Any, device: torch.device) -> dict[str, float]:
        embed = embed_with_encoder(student.encoder, "mean", None, *self.plan.stores[0][-1].normalisation)
        images, workers = self.images, self.config.workers
        train, val = (
            embed_images(part, embed, device, BATCH_SIZE, workers, "k-NN features")
            for part in (images.train, images.val)
        )
        top1, top5 = knn_accuracy(train, images.train_labels, val, images.val_labels, images.classes, device=device)
        return {"knn_top1": round(top1, 3), "knn_top5": round(top5, 3)}
