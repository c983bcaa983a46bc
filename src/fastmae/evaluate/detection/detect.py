"""`fastmae detect`: object detection and instance segmentation, Mask R-CNN on a plain ViT (Sec. 4.1.5, Table 8)."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmae.config.detection import DetectConfig
from fastmae.errors import InputError
from fastmae.evaluate.detection.average_precision import METRICS, average_precision
from fastmae.evaluate.detection.coco import Split, find_splits, read_split
from fastmae.evaluate.detection.inference import detections, gathered
from fastmae.evaluate.detection.network import build_detector
from fastmae.evaluate.detection.photos import Limits, Targets, TrainingPhotos, ValidationPhotos, as_batch, as_lists
from fastmae.evaluate.detection.pictures import draw, spread_images
from fastmae.evaluate.supervised import Recipe, Settings, adamw_groups, evaluation_batches, settle, train_task
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.durable import write_whole
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process
from fastmae.runtime.processes import this_process
from fastmae.runtime.progress import Progress
from fastmae.training.optimiser import linear_schedule
from fastmae.training.task import Task

COCO_IMAGES = 118_287
COCO_LIMITS = Limits(800, 1333)
"""Short and long side of Mask R-CNN's images on COCO."""
WARMUP_STEPS, MOST_WARMUP = 500, 0.1
"""Of warm-up, and at most this share of the run."""
RECIPE = Recipe(images=COCO_IMAGES, epochs=12, batch_size=16, lr=3e-4, warmup_epochs=WARMUP_STEPS * 16 / COCO_IMAGES)
"""Sec. 4.1.5: the 1x schedule, AdamW, 0.0003 at batch 16."""
MANY_IMAGES = 10_000
"""From which on they are given to the network at COCO's size, even if they are smaller."""
PICTURES_FILE = "detections.png"


def detect(config: DetectConfig) -> dict[str, Any] | None:
    """Train, or continue; the command's JSON (None in all processes but the first)."""
    _check(config)
    train, val = _read_data(config.data)
    settings = _settle(config, len(train.trainable()))
    torch.manual_seed(config.seed)
    opened = open_encoder(
        config.run, weights=config.weights, pretrained=config.pretrained, drop_path=config.drop_path, any_size=True
    )
    if opened.channels not in (1, 3):
        raise InputError(
            f"{config.run}: an encoder of {opened.channels} channels; photos have 3, or 1 where they are grey"
        )
    limits = _limits(config, train, opened.patch_size)
    task = _task(config, opened, train, val, limits)
    if _speaks():
        _announce(train, val, opened, limits)
    result = train_task(config, task, settings)
    return None if result is None else _with_every_figure(result, config.out)


def _check(config: DetectConfig) -> None:
    for name, least in (("image_size", 1), ("max_size", 1), ("head_channels", 1), ("pictures", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if config.out is None:
        raise InputError("give --out DIR, the folder for what is trained")


def _read_data(data: Path) -> tuple[Split, Split]:
    """Both splits, checked against themselves, each other and their files."""
    train_files, val_files = find_splits(data)
    train = read_split(train_files, progress="check train" if _speaks() else "")
    return train, read_split(val_files, train.classes, progress="check val" if _speaks() else "")


def _settle(config: DetectConfig, images: int) -> Settings:
    settings = settle(config, RECIPE, images)
    if config.warmup_epochs is not None:
        return settings
    return replace(settings, warmup_epochs=min(WARMUP_STEPS, MOST_WARMUP * settings.steps) / settings.steps_per_epoch)


def _limits(config: DetectConfig, train: Split, patch: int) -> Limits:
    short = COCO_LIMITS.short
    if len(train) < MANY_IMAGES:
        short = min(short, max(2 * patch, int(np.median(train.sizes.min(axis=1)))))
    short = config.image_size or short
    limits = Limits(short, config.max_size or round(short * COCO_LIMITS.long / COCO_LIMITS.short))
    if limits.short < 2 * patch or limits.long < limits.short:
        raise InputError(
            f"--image-size {limits.short}, --max-size {limits.long}: give two patches of {patch} px at least, the longest side no less"
        )
    return limits


def _task(config: DetectConfig, opened: OpenedEncoder, train: Split, val: Split, limits: Limits) -> Task:
    network = build_detector(opened, len(train.classes), limits, config.head_channels)
    if config.checkpoint_activations:
        opened.network.set_grad_checkpointing()
    return Task(
        name="detect",
        network=network,
        train_set=TrainingPhotos(train, limits, opened.channels, config.seed),
        collate=as_batch,
        step=step,
        evaluate=lambda bare, fabric: _evaluate(config, bare, fabric, val, limits, opened.channels),
        metric="box_ap",
        told=("box_ap", "mask_ap", "box_ap_50", "mask_ap_50"),
        groups=adamw_groups(config, network, opened.network),
        schedule=linear_schedule,
        description={
            "encoder": opened.describe("backbone.encoder."),
            "classes": [{"id": identity, "name": name} for identity, name in train.classes.items()],
            "limits": {"image_size": limits.short, "max_size": limits.long},
            "data": {"train": _counts(train), "val": _counts(val)},
        },
    )


def step(model: nn.Module, batch: tuple[list[torch.Tensor], Targets]) -> dict[str, torch.Tensor]:
    """Mask R-CNN's five losses, and their sum."""
    photos, targets = batch
    losses: Mapping[str, torch.Tensor] = model(photos, targets)
    return {"loss": torch.stack([loss.float() for loss in losses.values()]).sum(), **losses}


def _evaluate(
    config: DetectConfig, network: nn.Module, fabric: Fabric, val: Split, limits: Limits, channels: int
) -> dict[str, float]:
    photos = ValidationPhotos(val, limits, channels)
    batches = evaluation_batches(photos, len(val), fabric, 1, config.workers, as_lists)
    found = []
    share = len(range(fabric.global_rank, len(val), fabric.world_size))
    with Progress("detect val", "images", share, quiet=not fabric.is_global_zero) as progress:
        for detected in detections(network, val, batches):
            found.append(detected)
            progress.advance(1)
    found = gathered(fabric, found)
    figures: dict[str, float] = {}

    def measure_and_draw() -> None:
        figures.update(average_precision(val, found))
        if config.pictures and config.out is not None:
            picture = draw(val, found, spread_images(val, config.pictures), channels)
            write_whole(config.out / PICTURES_FILE, lambda aside: aside.write_bytes(picture))

    on_first_process(fabric, measure_and_draw)
    return fabric.broadcast(figures)


def _announce(train: Split, val: Split, opened: OpenedEncoder, limits: Limits) -> None:
    for split in (train, val):
        crowds = int(split.crowd.sum())
        print(
            f"{split.files.annotations}: {len(split)} images, {len(split.labels) - crowds} objects of {len(split.classes)} classes, "
            f"{crowds} crowds; {split.dropped} dropped for having no width, no height or no polygon of three points"
        )
    left_out = len(train) - len(train.trainable())
    crowds_only = f"; not trained on {left_out} images with nothing but crowds" if left_out else ""
    print(
        f"{opened.source}: patch {opened.patch_size}; images of {limits.short} pixels on the short side, at most {limits.long} on the long"
        f"{crowds_only}",
        flush=True,
    )


def _with_every_figure(result: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The JSON: null stands where val/ has no object to measure by."""
    absent = [name for name in METRICS if result.get(name) is None]
    figures = {name: result.get(name) for name in METRICS}
    said = ", ".join(
        f"{kind} AP {figures[f'{kind}_ap']:.1f} (50: {figures[f'{kind}_ap_50']:.1f}, 75: {figures[f'{kind}_ap_75']:.1f})"
        for kind in ("box", "mask")
    )
    none = f"; no object in val to measure {', '.join(absent)} by" if absent else ""
    print(f"{out}: {said}{none}; pictures: {out}/{PICTURES_FILE}")
    return {**result, **figures}


def _counts(split: Split) -> dict[str, int]:
    return {"images": len(split), "objects": len(split.labels)}


def _speaks() -> bool:
    """Whether this is the first process, before Fabric is there to ask."""
    return int(os.environ.get("LOCAL_RANK", this_process().rank)) == 0
