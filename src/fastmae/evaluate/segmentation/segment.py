"""`fastmae segment`: trains UperNet on a pre-trained encoder with labelled photos and measures mIoU (Table 7).

This file turns the options and the data into a training task, and reports its result. The data are found in `layout`,
checked in `data_check` and loaded in `datasets`; the network is in `upernet`, the measurement in `validation`.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastmae.config import SegmentConfig
from fastmae.errors import InputError
from fastmae.evaluate.recipe import Recipe, settle
from fastmae.evaluate.segmentation.augment import Augmentation
from fastmae.evaluate.segmentation.data_check import DataSummary, check_data
from fastmae.evaluate.segmentation.datasets import PairReader, TrainingCrops, WholePhotos
from fastmae.evaluate.segmentation.inference import MIN_PATCHES
from fastmae.evaluate.segmentation.layout import NAMES_FILE, SegmentationData, find_data
from fastmae.evaluate.segmentation.masks import IGNORED
from fastmae.evaluate.segmentation.mean_iou import confusion_matrix, iou_table
from fastmae.evaluate.segmentation.upernet import UperNet, segmentation_loss, sync_batch_norms, tapped_blocks
from fastmae.evaluate.segmentation.validation import CLASS_PREFIX, Validation
from fastmae.evaluate.stages import STRIDES, trainable_stages
from fastmae.images.views import PixelScale
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.batch_memory import check_batch
from fastmae.runtime.device import resolve_device
from fastmae.runtime.processes import is_first_process, this_process
from fastmae.runtime.wording import counted, weight_count
from fastmae.training.driver import train
from fastmae.training.optimiser import layer_decayed_groups, linear_schedule
from fastmae.training.run import grad_accum_steps, images_at_once
from fastmae.training.task import Settings, Task

log = logging.getLogger(__name__)

RECIPE = Recipe(images=20_210, epochs=127, batch_size=16, lr=1e-4, warmup_epochs=1500 * 16 / 20_210)
"""The UperNet recipe of MAE and BEiT on ADE20K: 160 k steps at batch size 16, the first 1500 of them warm-up."""
MAX_DEFAULT_CROP = 512
"""Largest crop size that is chosen by default, in pixels."""
MAX_DEFAULT_HEAD = 512
"""Largest default width of the head on a network that is not a plain ViT, in channels: UperNet's published width."""
PICTURES_FILE = "predictions.png"
SHOWN_NAMES = 20
"""Of classes, in a line of the log."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the crops, the photos and the head.

    Attributes:
        crop: side of a training crop and of an inference window, in pixels.
        short_side: length to which a photo's shorter side is resized, in pixels; 0 keeps the photo's own size.
        head_channels: width of the main head, in channels.
    """

    crop: int
    short_side: int
    head_channels: int


def segment(config: SegmentConfig) -> dict[str, Any] | None:
    """Train to the end, or continue an interrupted run, and measure on val.

    Returns:
        The command's JSON; None in all processes but the first.

    Raises:
        InputError: data or options that can't be used.
    """
    if config.out is None:
        raise InputError("give --out DIR, the folder for the trained model")
    data = find_data(config.data)
    settings = settle(config, RECIPE, len(data.train))
    torch.manual_seed(config.seed)
    opened = open_encoder(
        config.run,
        weights=config.weights,
        pretrained=config.pretrained,
        drop_path_rate=config.drop_path,
        dynamic_img_size=True,
    )
    summary = check_data(data, opened.channels, opened.value_range, quiet=not is_first_process())
    sizes = choose_sizes(config, opened, summary)
    opened = set_crop_size(opened, sizes.crop)
    task = make_task(config, settings, data, summary, opened, sizes)
    if is_first_process():
        log.info(describe_setup(data, summary, opened, sizes, config.inference))
    result = train(config, task, settings)
    return None if result is None else report(result, data, summary)


def choose_sizes(config: SegmentConfig, opened: OpenedEncoder, summary: DataSummary) -> Sizes:
    """The sizes from the options; what they leave open follows from the encoder and the photos.

    Raises:
        InputError: a crop size that is not a multiple of the patch size, or too small.
    """
    patch = opened.patch_size
    smallest = MIN_PATCHES * patch
    crop = config.crop_size or max(smallest, min(MAX_DEFAULT_CROP, summary.short_side) // patch * patch)
    if crop % patch or crop < smallest:
        nearest = max(smallest, crop // patch * patch)
        raise InputError(f"--crop-size {crop}: not a multiple of the patch size of {patch} px; take {nearest}")
    short_side = crop if config.short_side is None else config.short_side
    own_width = opened.dim if opened.is_vit else min(opened.dim, MAX_DEFAULT_HEAD)
    return Sizes(crop, short_side, config.head_channels or own_width)


def set_crop_size(opened: OpenedEncoder, crop: int) -> OpenedEncoder:
    """Resample the position embeddings once to the crop's grid, where they are then trained.

    Otherwise every forward pass in training would resample them. Networks that are not plain ViTs stay as they are.
    """
    if not opened.is_vit:
        return opened
    opened.network.set_input_size(img_size=(crop, crop))
    return replace(opened, image_size=crop)


@dataclass(frozen=True)
class SegmentationStep:
    """A training step: normalises the crops and computes the loss of both heads.

    Attributes:
        pixel_scale: normalises the crops.
    """

    pixel_scale: PixelScale

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Scalars `loss`, `decode_loss`, `auxiliary_loss`.

        Args:
            model: float32 [B, K, S, S] -> logits of both heads.
            batch: crops uint8 [B, K, S, S] and masks uint8 [B, S, S].
        """
        images, masks = batch
        return segmentation_loss(model(self.pixel_scale(images)), masks)


def make_task(
    config: SegmentConfig,
    settings: Settings,
    data: SegmentationData,
    summary: DataSummary,
    opened: OpenedEncoder,
    sizes: Sizes,
) -> Task:
    """The network, the data, the loss and the measurement, for the training loop."""
    assert config.out is not None
    classes = summary.class_names
    processes = max(config.devices, this_process().world_size)
    _check_batch(config, settings, processes)
    check_batch(images_at_once(config, settings.batch_size), opened.channels, sizes.crop)
    if config.checkpoint_activations:
        opened.network.set_grad_checkpointing()
    stages = None if opened.is_vit else trainable_stages(opened)
    uper_net = UperNet(opened.network, len(classes), sizes.head_channels, stages)
    network: Any = sync_batch_norms(uper_net, resolve_device(config.device), processes)
    read_pair = PairReader(data, len(classes), opened.channels, opened.value_range)
    mean_colour = tuple(round(255 * value) for value in opened.mean)
    augment = Augmentation(sizes.crop, sizes.short_side, mean_colour)
    pixel_scale = PixelScale(opened.mean, opened.std)
    validation = Validation(
        photos=WholePhotos(data.val, read_pair, sizes.short_side),
        class_names=classes,
        pixel_scale=pixel_scale,
        patch_size=opened.patch_size,
        window=sizes.crop if config.inference == "slide" else None,
        workers=config.workers,
        num_pictures=config.pictures,
        pictures_file=config.out / PICTURES_FILE,
        confusion_matrix=confusion_matrix(len(classes)),
    )
    return Task(
        name="segment",
        out=config.out,
        headline=f"segment: {weight_count(sum(parameter.numel() for parameter in network.parameters()))}",
        network=network,
        dataset=TrainingCrops(data.train, read_pair, augment, config.seed),
        step=SegmentationStep(pixel_scale),
        evaluate=validation,
        metric="miou",
        parameter_groups=partial(
            layer_decayed_groups, network, network.encoder, config.weight_decay, config.layer_decay
        ),
        description={
            "encoder": opened.describe(),
            "segmentation": {**vars(sizes), "classes": list(classes)},
            "photos": {"train": len(data.train), "val": len(data.val), "names_sha256": _hash_of_names(data)},
        },
        schedule=linear_schedule,
    )


def describe_setup(
    data: SegmentationData, summary: DataSummary, opened: OpenedEncoder, sizes: Sizes, inference: str
) -> str:
    """The data and the sizes that follow from them, as lines for the log."""
    num_pairs = len(data.train) + len(data.val)
    if summary.masks_read == num_pairs:
        masks_read = "all masks read"
    else:
        masks_read = f"{summary.masks_read} of {num_pairs} masks read now, the rest when they are used"
    source = data.names_source or "as many as the masks hold"
    lines = [
        f"{data.root}: {counted(len(data.train), 'photo')} for training, {len(data.val)} for validation; "
        f"{counted(len(summary.class_names), 'class', 'classes')} ({source}); {masks_read}"
    ]
    if data.unused_masks:
        lines.append(f"not used, as no photo is theirs: {counted(data.unused_masks, 'mask')}")
    if summary.untrained_classes:
        lines.append(_untrained(data, summary))
    if opened.is_vit:
        depth = len(opened.network.blocks)
        read, unit = f"blocks {', '.join(map(str, tapped_blocks(depth)))} of {depth}", "patches"
    else:
        read, unit = f"maps of strides {', '.join(map(str, STRIDES))}", "strides"
    lines.append(f"UperNet of {counted(sizes.head_channels, 'channel')} on {opened.source}, reading {read}")
    resize = f"shorter sides resized to {sizes.short_side} px" if sizes.short_side else "photos at their own size"
    windows = "sliding windows of that size" if inference == "slide" else "whole photos"
    lines.append(f"{unit} of {opened.patch_size} px; {resize}; training crops of {sizes.crop} px, val by {windows}")
    return "\n".join(lines)


def _untrained(data: SegmentationData, summary: DataSummary) -> str:
    """Which classes no training mask shows; and, if only the masks tell the classes, what the ids may be instead."""
    absent = f"classes without a pixel in the training masks read: {_listed(summary.untrained_classes)}"
    if data.class_names is not None:
        return absent
    ids = summary.trained_classes
    return (
        f"{absent}. Only {len(ids)} of the ids 0 to {len(summary.class_names) - 1} occur: {_listed(ids)}; "
        f"{IGNORED} is ignored ({100 * summary.ignored_share:.3g} % of the pixels). If these ids stand for 0, 1, 2 and "
        f"so on, write them so; names in {NAMES_FILE} say how many there are"
    )


def _listed(names: Sequence[str]) -> str:
    """The names, or the first of many, and their number."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def report(result: Mapping[str, Any], data: SegmentationData, summary: DataSummary) -> dict[str, Any]:
    """Log the table of classes, and give the command's JSON."""
    ious = {name: result[CLASS_PREFIX + name] for name in summary.class_names}
    log.info(
        f"{iou_table(ious)}\n"
        f"{data.root}: mIoU {result['miou']:.2f} %, pixel accuracy {result['pixel_accuracy']:.2f} % "
        f"on {counted(len(data.val), 'photo')} "
        f"(best mIoU {result['best_miou']:.2f} % after epoch {result['best_epoch']:g}, in {result['best']})"
    )
    figures = {name: value for name, value in result.items() if not name.startswith(CLASS_PREFIX)}
    rounded = {name: round(result[name], 3) for name in ("miou", "pixel_accuracy", "best_miou")}
    return {
        **figures,
        **rounded,
        "classes": {name: None if iou is None else round(iou, 3) for name, iou in ious.items()},
        "images": len(data.val),
        "train": len(data.train),
        "val": len(data.val),
    }


def _check_batch(config: SegmentConfig, settings: Settings, processes: int) -> None:
    """UperNet pools a map to a single point and applies batch norm to it: over one image, that has no variance."""
    share = settings.batch_size // processes
    if share < 1 or share // grad_accum_steps(share, config.micro_batch) < 2:
        raise InputError(
            f"--batch-size {settings.batch_size}, --micro-batch {config.micro_batch}: UperNet's batch norm needs "
            "at least two images in each forward pass of a device"
        )


def _hash_of_names(data: SegmentationData) -> str:
    """SHA-256 of the photos' names, so that a run is not continued on other photos."""
    names = (str(pair.image.relative_to(data.root)) for pair in (*data.train, *data.val))
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
