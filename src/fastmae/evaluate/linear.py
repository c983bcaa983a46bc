"""`fastmae linear`: what a linear layer reads out of frozen features, by MAE's recipe (Table 6), or by logistic regression."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn
from torch.utils.data import Dataset, default_collate

from fastmae.config import LinearConfig
from fastmae.errors import InputError
from fastmae.evaluate.classification import measure_classifier
from fastmae.evaluate.supervised import Recipe, settle, train_task
from fastmae.evaluate.transforms import LabelledPictures, crop_augmentation, middle_crop
from fastmae.probes.embed import embed_pictures, features_of
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.probes.logistic import linear_accuracy
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.device import own_device
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.processes import this_process
from fastmae.runtime.workers import worker_count
from fastmae.training.task import Task

IMAGENET = Recipe(images=1_281_167, epochs=90, batch_size=16384, lr=6.4, warmup_epochs=10, lr_power=0.0)
"""MAE's for ViT-B (base rate 0.1 for 256 images; paper Sec. 4.1.2). On a fifth of Caltech-101's training images, held out, the best rate
was 6.4 to 12.8 at batch 256, 3 to 6.4 at 32: of the recipe's own size, not in proportion to the batch."""
MOMENTUM = 0.9
WEIGHT_DEVIATION = 0.01
"""Of the linear layer's weights at the start."""


def linear(config: LinearConfig) -> dict[str, Any] | None:
    """Probe; the command's JSON.

    Raises:
        InputError: data or options that can't be used.
    """
    data = open_labelled(config.data)
    settings = settle(config, IMAGENET, len(data.train))
    _check(config)
    torch.manual_seed(config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    read = features_of(opened.network, config.pool, config.block)
    kept = {
        split: _features(config, data, opened, read, split)
        for split in (("val",) if config.augment == "crop" else ("train", "val"))
    }
    if config.solver == "logistic":
        result: dict[str, Any] | None = _logistic(data, kept)
    else:
        with (
            TemporaryDirectory() as nowhere
        ):  # a probe takes minutes: without --out nothing of it is kept but the figures
            out = config.out or Path(nowhere) / "linear"
            result = train_task(replace(config, out=out), _task(config, data, opened, read, kept, out), settings)
    if result is not None:
        if config.out is None:
            result = {name: value for name, value in result.items() if name not in ("best", "checkpoint")}
        result |= {
            "train": len(data.train),
            "val": len(data.val),
            "classes": len(data.classes),
            "dim": kept["val"].shape[1],
        }
        how = (
            "logistic regression"
            if config.solver == "logistic"
            else f"{result['epochs']} epochs of LARS, {_best(result)}"
        )
        print(
            f"{config.run}{'' if config.pretrained else ', at random'}: linear top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} % "
            f"({how}; {len(data.train)} train, {len(data.val)} val images, {len(data.classes)} classes)"
        )
    return result


class KeptFeatures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Features and labels in memory; a batch at a time, since taking them one by one would cost more than the step.

    Args:
        features: float32 [n, D].
        labels: int64 [n].
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, visits: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.tensor([place for _, place in visits])
        return self.features[places], self.labels[places]


def build_probe(dim: int, classes: int) -> nn.Sequential:
    """Standardised by batch, then linear: [B, dim] -> [B, classes]."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=WEIGHT_DEVIATION)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), layer)


def lars(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """MAE's LARS: the trust ratio scales weights, not biases."""
    return Lars(groups, lr=lr, momentum=MOMENTUM, trust_coeff=0.001)


def _task(
    config: LinearConfig,
    data: LabelledFolder,
    opened: OpenedEncoder,
    read: Any,
    kept: dict[str, torch.Tensor],
    out: Path,
) -> Task:
    network = build_probe(kept["val"].shape[1], len(data.classes))
    layer = network[1]
    keep = "train" in kept
    return Task(
        name="linear",
        network=network,
        train_set=KeptFeatures(kept["train"], data.train_labels)
        if keep
        else LabelledPictures(data.train, data.train_labels, opened.channels, crop_augmentation(opened), config.seed),
        step=_step if keep else partial(_step, read=read),
        evaluate=partial(_measure, data=data, features=kept["val"], out=out),
        metric="top1",
        groups=[
            {"params": [layer.weight], "weight_decay": config.weight_decay, "always_adapt": True},
            {"params": [layer.bias], "weight_decay": 0.0, "always_adapt": False},
        ],
        description={"probed": opened.describe(), "data": data.describe()},
        optimizer=lars,
        collate=_as_it_is if keep else default_collate,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], read: Any = None) -> Mapping[str, torch.Tensor]:
    given, labels = batch
    if read is not None:
        with torch.no_grad():
            given = read(given).float()
    return {"loss": F.cross_entropy(model(given).float(), labels)}


def _measure(
    network: nn.Module, fabric: Fabric, *, data: LabelledFolder, features: torch.Tensor, out: Path
) -> Mapping[str, float]:
    mine = slice(fabric.global_rank, None, fabric.world_size)
    batch = features[mine].to(fabric.device), data.val_labels[mine].to(fabric.device)
    return measure_classifier(network, [batch], data.classes, fabric, out / "confusion.png")


def _features(config: LinearConfig, data: LabelledFolder, opened: OpenedEncoder, read: Any, split: str) -> torch.Tensor:
    paths, labels = (data.train, data.train_labels) if split == "train" else (data.val, data.val_labels)
    device = own_device(config.device)
    opened.network.to(device)
    pictures = LabelledPictures(paths, labels, opened.channels, middle_crop(opened))
    return embed_pictures(pictures, len(paths), read, device, 64, worker_count(config.workers), f"features {split}")


def _logistic(data: LabelledFolder, kept: dict[str, torch.Tensor]) -> dict[str, Any]:
    top1, top5 = linear_accuracy(kept["train"], data.train_labels, kept["val"], data.val_labels, len(data.classes))
    return {"top1": round(top1, 3), "top5": round(top5, 3)}


def _best(result: dict[str, Any]) -> str:
    return f"best evaluation {result['best_top1']:.1f} % at epoch {result['best_epoch']:g}"


def _check(config: LinearConfig) -> None:
    if config.augment == "none" and (config.devices > 1 or this_process().world_size > 1):
        raise InputError(
            "--augment none: features are kept in one process, and the probe on them takes minutes there; give --devices 1"
        )
    if config.out is not None and config.solver == "logistic":
        raise InputError("--out: --solver logistic keeps nothing; leave it out, or take --solver lars")
    if config.augment == "crop" and config.solver == "logistic":
        raise InputError("--solver logistic: takes features that stand still; give --augment none")
