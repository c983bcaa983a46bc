"""`fastmae linear`: a linear layer on frozen features, by MAE's recipe (Table 6) or by logistic regression."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn
from torch.utils.data import Dataset

from fastmae.config import LinearConfig
from fastmae.errors import InputError
from fastmae.evaluate.classification import measure_classifier, shown_figures
from fastmae.evaluate.recipe import Recipe, settle
from fastmae.evaluate.transforms import LabelledImages, centre_crop, crop_augmentation
from fastmae.probes.embed import EmbedNormalised, embed_images, pooled_features
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.probes.logistic import linear_accuracy
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.arithmetic import computes_as_asked, float32_products
from fastmae.runtime.batch_memory import check_batch
from fastmae.runtime.device import own_device
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.processes import this_process
from fastmae.runtime.wording import accuracies, counted, weight_count
from fastmae.runtime.workers import as_is
from fastmae.training.driver import train
from fastmae.training.run import images_at_once
from fastmae.training.task import Evaluated, ParameterGroups, Step, Task

log = logging.getLogger(__name__)
IMAGENET = Recipe(images=1_281_167, epochs=90, batch_size=16384, lr=6.4, warmup_epochs=10, lr_power=0.0)
"""MAE's recipe for ViT-B (base learning rate 0.1 for 256 images; Sec. 4.1.2). On a fifth of Caltech-101's training
images, held out, the best learning rate was 6.4 to 12.8 at batch 256 and 3 to 6.4 at batch 32: near the recipe's own,
and not in proportion to the batch."""
MOMENTUM, TRUST_COEFFICIENT = 0.9, 0.001
"""Of MAE's LARS."""
WEIGHT_STD = 0.01
"""Standard deviation of the linear layer's initial weights, as in MAE."""
BATCH_SIZE = 64
"""Images per forward pass while features are computed."""


@computes_as_asked
def linear(config: LinearConfig) -> dict[str, Any] | None:
    """Probe the encoder; the command's JSON (None in all processes but the first).

    Raises:
        InputError: data or options that can't be used.
    """
    if config.augment == "none" and this_process().world_size > 1:
        raise InputError("--augment none: features are computed once, in one process; give --devices 1")
    data = open_labelled(config.data)
    settings = settle(config, IMAGENET, len(data.train))
    torch.manual_seed(config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    check_batch(images_at_once(config, settings.batch_size), opened.channels, opened.image_size)
    embed = pooled_features(opened.network, config.pool, config.block)
    splits = ("val",) if config.augment == "crop" else ("train", "val")
    features = {split: _features(config, data, opened, embed, split) for split in splits}
    if config.solver == "logistic":
        result: dict[str, Any] | None = _logistic(data, features, own_device(config.device))
        method = "logistic regression"
    else:
        with TemporaryDirectory() as temporary:  # without --out, only the figures of the probe are kept
            out = config.out or Path(temporary) / "linear"
            result = train(config, probing_task(config, data, opened, embed, features, out), settings)
        if result is not None:
            best = f"best evaluation {result['best_top1']:.1f} % at epoch {result['best_epoch']:g}"
            method = f"{counted(result['epochs'], 'epoch')} of LARS, {best}"
    if result is None:
        return None
    if config.out is None:
        result = {name: value for name, value in result.items() if name not in ("best", "checkpoint")}
    log.info(
        f"{config.run}{'' if config.pretrained else ', random weights'}: linear "
        f"{accuracies(result['top1'], result['top5'], len(data.classes))} ({method}; {len(data.train)} train, "
        f"{counted(len(data.val), 'val image')}, {len(data.classes)} classes)"
    )
    sizes = {"train": len(data.train), "val": len(data.val), "classes": len(data.classes)}
    return {**result, **sizes, "dim": features["val"].shape[1]}


def probing_task(
    config: LinearConfig,
    data: LabelledFolder,
    opened: OpenedEncoder,
    embed: EmbedNormalised,
    features: dict[str, torch.Tensor],
    out: Path,
) -> Task:
    """The task for the training driver.

    Args:
        config: the options.
        data: the labelled images.
        opened: the encoder.
        embed: its features of normalised images.
        features: the features of val/, and those of train/ if they are computed once.
        out: folder of the run.
    """
    probe = build_probe(features["val"].shape[1], len(data.classes))
    augmented = "train" not in features
    dataset: Dataset[Any]
    if augmented:
        augmentation = crop_augmentation(opened)
        dataset = LabelledImages(
            data.train, data.train_labels, opened.channels, augmentation, config.seed, opened.value_range
        )
    else:
        dataset = FeatureRows(len(data.train))
    weights = sum(parameter.numel() for parameter in probe.parameters())
    return Task(
        name="linear",
        out=out,
        headline=f"linear: {weight_count(weights)}",
        network=probe,
        dataset=dataset,
        step=augmented_step(embed) if augmented else cached_step(features["train"], data.train_labels),
        parameter_groups=partial(_parameter_groups, probe, config.weight_decay),
        description={"probed": opened.describe(), "data": data.describe()},
        evaluate=partial(_measure, data=data, features=features["val"], out=out),
        metric="top1",
        shown=shown_figures(len(data.classes)),
        optimizer=lars,
        collate=None if augmented else as_is,
    )


class FeatureRows(Dataset[torch.Tensor]):
    """Rows of the features that were computed once. A batch is its rows, int64 [B]; the step reads the features.

    So features stay where they are, on a GPU say, which loading processes can't read.

    Args:
        images: number of images.
    """

    def __init__(self, images: int):
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitems__(self, visits: list[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor([index for _, index in visits])


def build_probe(dim: int, classes: int) -> nn.Sequential:
    """Standardise over the batch, then a linear layer: [B, dim] -> [B, classes]."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=WEIGHT_STD)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), layer)


def lars(groups: ParameterGroups, lr: float) -> torch.optim.Optimizer:
    """MAE's LARS: the trust ratio scales weights, but not biases."""
    return Lars(groups, lr=lr, momentum=MOMENTUM, trust_coeff=TRUST_COEFFICIENT)


def _parameter_groups(probe: nn.Sequential, weight_decay: float) -> ParameterGroups:
    layer = probe[1]
    return [
        {"params": [layer.weight], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [layer.bias], "weight_decay": 0.0, "always_adapt": False},
    ]


def augmented_step(embed: EmbedNormalised) -> Step:
    """A step on images, float32 [B, K, S, S], and labels, int64 [B]."""

    def step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        images, labels = batch
        with torch.no_grad(), float32_products(images.device, tf32=False):
            features = embed(images).float()
        return _loss(model, features, labels)

    return step


def cached_step(features: torch.Tensor, labels: torch.Tensor) -> Step:
    """A step on rows, int64 [B], of features that were computed once, float32 [n, D], and of labels, int64 [n]."""
    labels = labels.to(features.device)

    def step(model: nn.Module, rows: torch.Tensor) -> Mapping[str, torch.Tensor]:
        at = rows.to(features.device)  # the CPU, where the GPU has no room for the features
        return _loss(model, features[at].to(rows.device), labels[at].to(rows.device))

    return step


def _loss(model: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"loss": F.cross_entropy(model(features).float(), labels)}


def _measure(
    network: nn.Module, fabric: Fabric, *, data: LabelledFolder, features: torch.Tensor, out: Path
) -> Evaluated:
    share = slice(fabric.global_rank, None, fabric.world_size)
    batch = features[share].to(fabric.device), data.val_labels[share].to(fabric.device)
    return measure_classifier(network, [batch], data.classes, fabric, out / "confusion.png")


def _features(
    config: LinearConfig, data: LabelledFolder, opened: OpenedEncoder, embed: EmbedNormalised, split: str
) -> torch.Tensor:
    paths, labels = (data.train, data.train_labels) if split == "train" else (data.val, data.val_labels)
    device = own_device(config.device)
    opened.network.to(device)
    images = LabelledImages(paths, labels, opened.channels, centre_crop(opened), value_range=opened.value_range)
    return embed_images(images, embed, device, BATCH_SIZE, config.workers, f"features {split}")


def _logistic(data: LabelledFolder, features: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    top1, top5 = linear_accuracy(
        features["train"], data.train_labels, features["val"], data.val_labels, len(data.classes), device
    )
    return {"top1": round(top1, 3), "top5": round(top5, 3)}
