"""`fastmae detect`: trains Mask R-CNN on an encoder to find objects and their masks (Sec. 4.1.5, Table 8).

This file turns the options and the data into a training task, and reports its result. Annotations are read in `coco`,
photos in `datasets`; the network is in `mask_rcnn`, the measurement in `validation`.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmae.config import DetectConfig
from fastmae.errors import InputError
from fastmae.evaluate.detection.average_precision import METRICS
from fastmae.evaluate.detection.coco import Split, find_splits, read_split
from fastmae.evaluate.detection.datasets import (
    SizeLimits,
    Targets,
    TrainingPhotos,
    check_objects,
    collate_photos,
)
from fastmae.evaluate.detection.mask_rcnn import build_detector
from fastmae.evaluate.detection.pyramid import patch_of_pyramid
from fastmae.evaluate.detection.validation import Validation
from fastmae.evaluate.recipe import Recipe, settle
from fastmae.evaluate.stages import STRIDES
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.processes import is_first_process
from fastmae.runtime.wording import counted, weight_count
from fastmae.training.driver import train
from fastmae.training.optimiser import layer_decayed_groups, linear_schedule
from fastmae.training.task import Settings, Task

log = logging.getLogger(__name__)

COCO_IMAGES = 118_287
COCO_LIMITS = SizeLimits(800, 1333)
"""Short and long side of Mask R-CNN's images on COCO, in pixels."""
WARMUP_STEPS = 500
MAX_WARMUP_SHARE = 0.1
"""Largest share of the run that is warm-up."""
RECIPE = Recipe(images=COCO_IMAGES, epochs=12, batch_size=16, lr=3e-4, warmup_epochs=WARMUP_STEPS * 16 / COCO_IMAGES)
"""Sec. 4.1.5: the 1x schedule with AdamW, learning rate 0.0003 at batch size 16."""
COCO_SIZE_FROM = 10_000
"""Data sets of at least this many images are trained on at COCO's image size, even where their images are smaller."""
PICTURES_FILE = "detections.png"


def detect(config: DetectConfig) -> dict[str, Any] | None:
    """Train to the end, or continue an interrupted run, and measure on val.

    Returns:
        The command's JSON; None in all processes but the first.

    Raises:
        InputError: data or options that can't be used.
    """
    if config.out is None:
        raise InputError("give --out DIR, the folder for the trained model")
    train_split, val_split = _read_data(config.data)
    settings = _settle(config, len(train_split.trainable_images()))
    torch.manual_seed(config.seed)
    opened = open_encoder(
        config.run,
        weights=config.weights,
        pretrained=config.pretrained,
        drop_path_rate=config.drop_path,
        dynamic_img_size=True,
    )
    if opened.channels not in (1, 3):
        raise InputError(
            f"{config.run}: the encoder takes {counted(opened.channels, 'channel')}; photos have 3, or 1 if grey"
        )
    limits = _choose_limits(config, train_split, patch_of_pyramid(opened))
    thin = check_objects(train_split, limits)
    task = _make_task(config, opened, train_split, val_split, limits)
    if is_first_process():
        log.info(_describe_setup(train_split, val_split, opened, limits, thin))
    result = train(config, task, settings)
    return None if result is None else _report(result, config.out)


def _read_data(data: Path) -> tuple[Split, Split]:
    """Both splits, checked against themselves, each other and their image files."""
    show_progress = is_first_process()
    train_files, val_files = find_splits(data)
    train = read_split(train_files, progress="check train" if show_progress else "")
    return train, read_split(val_files, train.classes, progress="check val" if show_progress else "")


def _settle(config: DetectConfig, images: int) -> Settings:
    """The training settings, with `WARMUP_STEPS` of warm-up where the options leave it open."""
    settings = settle(config, RECIPE, images)
    if config.warmup_epochs is not None:
        return settings
    warmup_steps = min(WARMUP_STEPS, MAX_WARMUP_SHARE * settings.steps)
    return replace(settings, warmup_epochs=warmup_steps / settings.steps_per_epoch)


def _choose_limits(config: DetectConfig, train: Split, patch: int) -> SizeLimits:
    """The image size from the options; by default COCO's, or the median short side of small data if that is less."""
    short = COCO_LIMITS.short
    if len(train) < COCO_SIZE_FROM:
        median = int(np.median(train.sizes.min(axis=1)))
        short = min(short, max(2 * patch, median))
    short = config.image_size or short
    limits = SizeLimits(short, config.max_size or round(short * COCO_LIMITS.long / COCO_LIMITS.short))
    if limits.short < 2 * patch or limits.long < limits.short:
        raise InputError(
            f"--image-size {limits.short}, --max-size {limits.long}: give at least two patches of {patch} px, "
            "and no less for the longest side"
        )
    return limits


def _make_task(config: DetectConfig, opened: OpenedEncoder, train: Split, val: Split, limits: SizeLimits) -> Task:
    """The network, the data, the loss and the measurement, for the training loop."""
    assert config.out is not None
    network = build_detector(opened, len(train.classes), limits, config.head_channels)
    if config.checkpoint_activations:
        opened.network.set_grad_checkpointing()
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return Task(
        name="detect",
        out=config.out,
        headline=f"detect: {weight_count(trainable)}",
        network=network,
        dataset=TrainingPhotos(train, limits, opened.channels, config.seed, opened.value_range),
        collate=collate_photos,
        step=detection_step,
        evaluate=Validation(
            split=val,
            limits=limits,
            channels=opened.channels,
            value_range=opened.value_range,
            workers=config.workers,
            num_pictures=config.pictures,
            pictures_file=config.out / PICTURES_FILE,
        ),
        metric="box_ap",
        shown=("box_ap", "mask_ap", "box_ap_50", "mask_ap_50"),
        parameter_groups=partial(
            layer_decayed_groups, network, opened.network, config.weight_decay, config.layer_decay
        ),
        schedule=linear_schedule,
        description={
            "encoder": opened.describe("backbone.encoder."),
            "classes": [{"id": category_id, "name": name} for category_id, name in train.classes.items()],
            "limits": {"image_size": limits.short, "max_size": limits.long},
            "data": {
                "train": {"images": len(train), "objects": len(train.labels)},
                "val": {"images": len(val), "objects": len(val.labels)},
            },
        },
    )


def detection_step(model: nn.Module, batch: tuple[list[torch.Tensor], Targets]) -> dict[str, torch.Tensor]:
    """Mask R-CNN's five losses as scalars, and their sum as `loss`.

    Args:
        model: (photos, targets) -> the five losses.
        batch: photos uint8 [K, H, W] of different sizes, and their objects.
    """
    photos, targets = batch
    losses: Mapping[str, torch.Tensor] = model(photos, targets)
    return {"loss": torch.stack([loss.float() for loss in losses.values()]).sum(), **losses}


def _describe_setup(train: Split, val: Split, opened: OpenedEncoder, limits: SizeLimits, thin: int) -> str:
    """The data and the image size, as lines for the log. `thin` objects have no width or no height at that size."""
    lines = []
    for split in (train, val):
        num_crowds = int(split.is_crowd.sum())
        classes = counted(len(split.classes), "class", "classes")
        lines.append(
            f"{split.files.annotations}: {counted(len(split), 'image')}, "
            f"{counted(len(split.labels) - num_crowds, 'object')} of {classes}, {counted(num_crowds, 'crowd')}; "
            f"{split.dropped} dropped for having no width, no height or no polygon of three points"
        )
    sizes = f"images of {limits.short} px on the short side, at most {limits.long} px on the long side"
    crowds_only = len(train) - len(train.trainable_images())
    left_out = f"; {crowds_only} images with nothing but crowds are not trained on" if crowds_only else ""
    left_out += f"; objects left out for having no width or no height at this size: {thin}" if thin else ""
    read = f"patches of {opened.patch_size} px" if opened.is_vit else f"maps of strides {', '.join(map(str, STRIDES))}"
    lines.append(f"{opened.source}: {read}; {sizes}{left_out}")
    return "\n".join(lines)


def _report(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """Log the result, and give the command's JSON: None stands for a figure that val has no object to measure by."""
    figures = {name: result.get(name) for name in METRICS}
    summary = ", ".join(
        f"{kind} AP {result[f'{kind}_ap']:.1f} (50: {result[f'{kind}_ap_50']:.1f}, 75: {result[f'{kind}_ap_75']:.1f})"
        for kind in ("box", "mask")
    )
    missing = [name for name, value in figures.items() if value is None]
    no_objects = f"; val has no object to measure {', '.join(missing)}" if missing else ""
    log.info(f"{out}: {summary}{no_objects}; pictures: {out / PICTURES_FILE}")
    return {**result, **figures}
