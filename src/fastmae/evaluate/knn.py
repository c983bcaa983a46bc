"""`fastmae knn`: weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018; k = 20, T = 0.07 as in DINO)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.config import KnnConfig
from fastmae.errors import InputError
from fastmae.images.sources import labelled_split
from fastmae.probes.embed import Embed, embed_files, embed_with_encoder, embed_with_teacher
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runs.encoder import NotAViTError, open_encoder
from fastmae.runs.load import load_run
from fastmae.runtime.device import resolve_device
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher
from fastmae.teachers.efficientnet_lite import LITES
from fastmae.teachers.factory import load_network, teacher_of_store

TEACHER_PATCH = 16
"""Pixels a patch for a teacher given by name, without a store."""


@dataclass(frozen=True)
class FrozenFeatures:
    """A way to embed pictures: the function, the side in pixels and the channels that it takes, and how they come to that size."""

    embed: Embed
    image_size: int
    resize: str
    channels: int = 3


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of a labelled folder: float32 [n, D] and [m, D], their classes' numbers, and how many classes there are."""

    train: torch.Tensor
    train_labels: torch.Tensor
    val: torch.Tensor
    val_labels: torch.Tensor
    classes: int
    image_size: int


def knn(config: KnnConfig) -> dict[str, Any]:
    """Accuracy on val/ by the votes of train/; the command's JSON."""
    if config.k < 1:
        raise InputError(f"--k {config.k}: give 1 or more")
    if not config.temperature > 0:
        raise InputError(f"--temperature {config.temperature}: give more than 0")
    found = labelled_features(config)
    top1, top5 = accuracy_of(found, config.k, config.temperature)
    what = config.run if config.features == "encoder" else f"{config.run}, {config.features}"
    n, m = len(found.train), len(found.val)
    print(f"{what}: kNN top-1 {top1:.1f} %, top-5 {top5:.1f} % ({n} train, {m} val images, {found.classes} classes)")
    return {
        "top1": round(top1, 3), "top5": round(top5, 3), "features": config.features,
        "train": n, "val": m, "classes": found.classes, "dim": found.train.shape[1], "image_size": found.image_size,
    }  # fmt: skip


def labelled_features(config: KnnConfig) -> LabelledFeatures:
    """Embed train/ and val/.

    Raises:
        InputError: options or data that can't be used.
    """
    device, workers = resolve_device(config.device), worker_count(config.workers)
    for name in ("batch_size", "image_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    (train_paths, train_names), (val_paths, val_names) = (
        labelled_split(config.data, split) for split in ("train", "val")
    )
    classes = sorted(set(train_names))
    unknown = sorted(set(val_names) - set(classes))
    if unknown:
        raise InputError(f"{config.data / 'val' / unknown[0]}: a class that train/ does not have")
    frozen = frozen_features(config, device)
    train, val = (
        embed_files(
            paths,
            frozen.embed,
            frozen.image_size,
            frozen.resize,
            device,
            config.batch_size,
            workers,
            f"features {split}",
            frozen.channels,
        )
        for split, paths in (("train", train_paths), ("val", val_paths))
    )
    train_labels, val_labels = (
        torch.tensor([classes.index(name) for name in names]) for names in (train_names, val_names)
    )
    return LabelledFeatures(train, train_labels, val, val_labels, len(classes), frozen.image_size)


def accuracy_of(found: LabelledFeatures, k: int = 20, temperature: float = 0.07) -> tuple[float, float]:
    """k-NN top-1 and top-5 of embedded data, in percent."""
    return knn_accuracy(found.train, found.train_labels, found.val, found.val_labels, found.classes, k, temperature)


def frozen_features(config: KnnConfig, device: torch.device) -> FrozenFeatures:
    """What `RUN` names: an encoder (of a run, also at random, or its teacher; see `encoders`), or a teacher.

    Raises:
        InputError: none of these, or options that don't go with it.
    """
    if config.features == "teacher":
        return _of_teacher(config, device)
    torch.manual_seed(config.seed)
    if config.run in LITES or config.run.startswith("hf/"):
        return _of_network(config, load_network(config.run, config.weights)[0], device)
    try:
        opened = open_encoder(
            config.run,
            config.image_size,
            weights=config.weights,
            pretrained=config.pretrained and config.features == "encoder",
        )
    except NotAViTError as other:
        return _of_network(config, other.network, device)
    embed = embed_with_encoder(opened.network.to(device), config.pool, config.block, opened.mean, opened.std)
    return FrozenFeatures(embed, opened.image_size, opened.resize, opened.channels)


def _of_teacher(config: KnnConfig, device: torch.device) -> FrozenFeatures:
    """The teacher of a run's store, at the size at which it saw the images."""
    if not Path(config.run).exists():
        raise InputError(f"--features teacher: goes with a run, not with {config.run}")
    description, _ = load_run(Path(config.run))
    store = description.get("store")
    if store is None:
        raise InputError(
            f"--features teacher: {config.run} was not pre-trained on a store; give the run that it was made from"
        )
    size = store["middle_sizes"][-1]
    teacher = teacher_of_store(store["teachers"][0], size, size // store["patch_size"]).to(device)
    return FrozenFeatures(embed_with_teacher(teacher), size, store["resize"], store["channels"])


def _of_network(config: KnnConfig, network: Any, device: torch.device) -> FrozenFeatures:
    """A teacher by name, that is no plain ViT of timm's."""
    if config.features != "encoder":
        raise InputError(f"--features {config.features}: {config.run} is a teacher; give a run, or timm/NAME")
    if config.pool == "class":
        raise InputError(f"--pool class: {config.run} has no class token; take --pool mean")
    own = getattr(network, "pretrained_cfg", {})  # transformers' models have none
    size = int(config.image_size or (own["input_size"][-1] if own else network.native_size))
    teacher = Teacher(config.run, network, size, max(1, size // TEACHER_PATCH), config.block)
    return FrozenFeatures(embed_with_teacher(teacher.to(device)), size, "whole")
