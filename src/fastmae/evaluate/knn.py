"""`fastmae knn`: k-nearest-neighbour accuracy of frozen features."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.config import KnnConfig
from fastmae.config.teacher import names_code
from fastmae.errors import InputError
from fastmae.images.value_range import AUTO
from fastmae.probes.embed import Embed, WholeImages, embed_images, embed_with_encoder, embed_with_teacher
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.probes.neighbours import knn_accuracy
from fastmae.runs.encoder import open_encoder
from fastmae.runs.load import load_run
from fastmae.runtime.batch_memory import check_batch
from fastmae.runtime.device import resolve_device
from fastmae.runtime.wording import accuracies, counted
from fastmae.teachers import Teacher
from fastmae.teachers.efficientnet_lite import LITES
from fastmae.teachers.factory import load_network, teacher_of_store

log = logging.getLogger(__name__)
TEACHER_PATCH_SIZE = 16
"""Pixels per patch, for a teacher that is given by name, without a store."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A way to embed pictures.

    Attributes:
        embed: embeds a batch.
        image_size: side of its images in pixels.
        resize: how pictures are brought to this size, a key of `images.middle.RESIZE`.
        channels: channels of its images.
        value_range: how values of more than 8 bits become 8 bits.
    """

    embed: Embed
    image_size: int
    resize: str
    channels: int = 3
    value_range: str = AUTO


@dataclass(frozen=True)
class LabelledFeatures:
    """The features of a labelled folder, on the device if there is room for them.

    Attributes:
        train: float32 [n, D].
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: number of classes.
        image_size: side of the embedded images in pixels.
        device: where they were computed.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    val: torch.Tensor
    val_labels: torch.Tensor
    classes: int
    image_size: int
    device: torch.device


def knn(config: KnnConfig) -> dict[str, Any]:
    """Accuracy on val/ by the votes of train/; the command's JSON.

    Raises:
        InputError: options or data that can't be used.
    """
    features = labelled_features(config)
    train_count, val_count = len(features.train), len(features.val)
    top1, top5 = knn_accuracy(
        features.train,
        features.train_labels,
        features.val,
        features.val_labels,
        features.classes,
        config.k,
        config.temperature,
        features.device,
    )
    source = config.run if config.features == "encoder" else f"{config.run}, {config.features}"
    log.info(
        f"{source}: k-NN {accuracies(top1, top5, features.classes)} ({train_count} train, "
        f"{counted(val_count, 'val image')}, {features.classes} classes)"
    )
    return {
        "top1": round(top1, 3),
        "top5": round(top5, 3),
        "features": config.features,
        "train": train_count,
        "val": val_count,
        "classes": features.classes,
        "dim": features.train.shape[1],
        "image_size": features.image_size,
    }


def labelled_features(config: KnnConfig, data: LabelledFolder | None = None) -> LabelledFeatures:
    """Embed train/ and val/.

    Args:
        config: the options.
        data: the labelled images; None: those of `config.data`.

    Raises:
        InputError: options or data that can't be used.
    """
    device = resolve_device(config.device)
    data = data or open_labelled(config.data)
    extractor = feature_extractor(config, device)
    images_at_once = min(config.batch_size, max(len(data.train), len(data.val)))
    check_batch(images_at_once, extractor.channels, extractor.image_size)
    train, val = (
        embed_images(
            WholeImages(paths, extractor.image_size, extractor.resize, extractor.channels, extractor.value_range),
            extractor.embed,
            device,
            config.batch_size,
            config.workers,
            f"features {split}",
        )
        for split, paths in (("train", data.train), ("val", data.val))
    )
    return LabelledFeatures(
        train, data.train_labels, val, data.val_labels, len(data.classes), extractor.image_size, device
    )


def feature_extractor(config: KnnConfig, device: torch.device) -> FeatureExtractor:
    """What RUN names: an encoder (for a run also with random weights, or its teacher), or a teacher.

    Raises:
        InputError: none of these, or options that don't fit it.
    """
    if config.features == "teacher":
        return _of_the_runs_teacher(config, device)
    torch.manual_seed(config.seed)
    if config.run in LITES or config.run.startswith("hf/") or names_code(config.run):
        return _of_a_teacher(config, load_network(config.run, config.weights)[0], device)
    pretrained = config.pretrained and config.features == "encoder"
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=pretrained)
    embed = embed_with_encoder(opened.network.to(device), config.pool, config.block, opened.mean, opened.std)
    return FeatureExtractor(embed, opened.image_size, opened.resize, opened.channels, opened.value_range)


def _of_the_runs_teacher(config: KnnConfig, device: torch.device) -> FeatureExtractor:
    """The teacher of a run's store, at the size at which it saw the images."""
    if not Path(config.run).exists():
        raise InputError(f"--features teacher: needs a run, not {config.run}")
    description, _ = load_run(Path(config.run))
    store = description.get("store")
    if store is None:
        raise InputError(
            f"--features teacher: {config.run} was not pre-trained on a store; give the run it was made from"
        )
    size = store["middle_sizes"][-1]
    teacher = teacher_of_store(store["teachers"][0], size, size // store["patch_size"], config.run, config.teacher)
    value_range = store.get("value_range", AUTO)
    return FeatureExtractor(
        embed_with_teacher(teacher.to(device)), size, store["resize"], store["channels"], value_range
    )


def _of_a_teacher(config: KnnConfig, network: Any, device: torch.device) -> FeatureExtractor:
    """A network that is not timm's, used as a teacher."""
    if config.features != "encoder":
        raise InputError(f"--features {config.features}: {config.run} is a teacher; give a run, or timm/NAME")
    if config.pool == "class":
        raise InputError(f"--pool class: {config.run} has no class token; use --pool mean")
    pretrained_cfg = getattr(network, "pretrained_cfg", {})  # transformers' models have none
    native_size = pretrained_cfg["input_size"][-1] if pretrained_cfg else network.native_size
    size = int(config.image_size or native_size)
    teacher = Teacher(config.run, network, size, max(1, size // TEACHER_PATCH_SIZE), config.block)
    return FeatureExtractor(embed_with_teacher(teacher.to(device)), size, "whole")
