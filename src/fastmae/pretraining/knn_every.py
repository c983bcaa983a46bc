"""`pretrain --knn-every`: does it learn? k-NN accuracy of the encoder as it stands, on labelled images, while it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from fastmae.errors import InputError
from fastmae.images.sources import labelled_split
from fastmae.probes.embed import WholeImages, embed_pictures, embed_with_encoder
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runtime.fabric import Fabric
from fastmae.tokens import TokenStore
from fastmae.training.state import WHOLE

MOST_IMAGES = 5000
"""Of a store, spread over all of it: a measurement is to take seconds."""
HELD_OUT = 5
"""Every so manieth of a store's images asks, the others vote."""
NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class LabelledPixels:
    """Pictures with labels, apart in those that vote and those that ask.

    Attributes:
        votes: gives uint8 [K, S, S].
        vote_labels: int64, one for each.
        asks: gives the same.
        ask_labels: int64.
    """

    votes: Dataset[torch.Tensor]
    vote_labels: torch.Tensor
    asks: Dataset[torch.Tensor]
    ask_labels: torch.Tensor


class MiddleViews(Dataset[torch.Tensor]):
    """The middles of a store's images, uint8 [K, S, S].

    Args:
        store: whose.
        indices: which images.
        size: S, in pixels.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray, size: int):
        self.store, self.indices = store, indices
        self.patches = size // store.info.patch_size
        self.first = (store.grid - self.patches) // 2

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.store.view_pixels(int(self.indices[place]), self.first, self.first, self.patches)


def labelled_images(data: Path | None, store: TokenStore, size: int) -> LabelledPixels:
    """The pictures to measure on: a labelled folder's, or the store's own by the names of their folders.

    Args:
        data: with train/<class>/* and val/<class>/*; None: the store's images.
        store: of the run.
        size: side of what is embedded, in pixels.

    Raises:
        InputError: the store's images lie in one folder, or the data can't be used.
    """
    if data is not None:
        (votes, vote_names), (asks, ask_names) = (labelled_split(data, split) for split in ("train", "val"))
        classes = sorted({*vote_names, *ask_names})
        how = (size, store.info.resize, store.info.channels)
        return LabelledPixels(
            WholeImages(votes, *how),
            _numbers(vote_names, classes),
            WholeImages(asks, *how),
            _numbers(ask_names, classes),
        )
    chosen = np.unique(np.linspace(0, len(store) - 1, min(len(store), MOST_IMAGES)).round().astype(np.int64))
    folders = [Path(store.key(int(index))).parent.name for index in chosen]
    classes = sorted(set(folders))
    if len(classes) < 2:
        raise InputError(
            f"--knn-every: {store.folder}'s images lie in one folder, so none has a label; give --knn-data DATA"
        )
    labels, asking = _numbers(folders, classes), np.arange(len(chosen)) % HELD_OUT == 0
    return LabelledPixels(
        MiddleViews(store, chosen[~asking], size), labels[~torch.from_numpy(asking)],
        MiddleViews(store, chosen[asking], size), labels[torch.from_numpy(asking)],
    )  # fmt: skip


def knn_of_student(
    images: LabelledPixels,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    fabric: Fabric,
    batch_size: int,
    workers: int,
    build: Callable[[], nn.Module],
) -> Callable[[Any], Mapping[str, float]]:
    """What measures a student: its encoder's k-NN top-1 and top-5, in percent. The first process measures, the others wait.

    Args:
        images: to measure on.
        normalisation: mean and deviation by which the encoder's images are normalised.
        fabric: of the run.
        batch_size: images a forward.
        workers: loading processes.
        build: makes another such student, for the whole weights of one whose own are shared out.
    """

    def measure(student: Any) -> Mapping[str, float]:
        if any(isinstance(weight, DTensor) for weight in student.parameters()):
            student = whole(student)
        found = measured(student.encoder) if fabric.is_global_zero else {}
        return fabric.broadcast(found)

    def whole(student: nn.Module) -> Any:
        weights = get_model_state_dict(student, options=WHOLE)  # every process takes part; the first one gets them
        unsharded = build().to(fabric.device).eval()
        if fabric.is_global_zero:
            unsharded.load_state_dict(weights)
        return unsharded

    def measured(encoder: Any) -> dict[str, float]:
        embed = embed_with_encoder(encoder, "mean", None, *normalisation)
        votes, asks = (
            embed_pictures(pictures, len(labels), embed, fabric.device, batch_size, workers, "kNN features", quiet=True)
            for pictures, labels in ((images.votes, images.vote_labels), (images.asks, images.ask_labels))
        )
        classes = int(max(images.vote_labels.max(), images.ask_labels.max())) + 1
        top1, top5 = knn_accuracy(votes, images.vote_labels, asks, images.ask_labels, classes, NEIGHBOURS, TEMPERATURE)
        return {"knn_top1": round(top1, 3), "knn_top5": round(top5, 3)}

    return measure


def _numbers(names: list[str], classes: list[str]) -> torch.Tensor:
    places = {name: place for place, name in enumerate(classes)}
    return torch.tensor([places[name] for name in names])
