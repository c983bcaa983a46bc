"""`fastmae segment`: UperNet on a pre-trained ViT, trained on photos with masks, measured by mIoU (Table 7)."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastmae.config import SegmentConfig
from fastmae.errors import InputError
from fastmae.evaluate.segmentation.augment import Augmentation
from fastmae.evaluate.segmentation.data import SegmentationData, find_data
from fastmae.evaluate.segmentation.inference import LEAST_PATCHES
from fastmae.evaluate.segmentation.measure import CLASS_PREFIX, Validation
from fastmae.evaluate.segmentation.network import UperNet, segmentation_loss, synchronised, tapped_blocks
from fastmae.evaluate.segmentation.samples import PairReader, TrainingCrops, WholePhotos, stack
from fastmae.evaluate.segmentation.scores import confusion_matrix, table
from fastmae.evaluate.segmentation.survey import Survey, survey
from fastmae.evaluate.supervised import Recipe, Settings, adamw_groups, settle, train_task
from fastmae.images.views import normalise
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.device import resolve_device
from fastmae.runtime.processes import this_process
from fastmae.training.optimiser import linear_schedule
from fastmae.training.task import Task, micro_batches

RECIPE = Recipe(images=20_210, epochs=127, batch_size=16, lr=1e-4, warmup_epochs=1500 * 16 / 20_210)
"""ADE20K: 160 k steps of 16, 1500 of them warm-up. (MAE's and BEiT's UperNet)"""
LARGEST_CROP = 512
SHEET_FILE = "predictions.png"


@dataclass(frozen=True)
class Sizes:
    """In pixels, and channels.

    Attributes:
        crop: side of a training crop and of a window.
        short_side: to which a photo's shorter side is brought; 0: it stays.
        head_channels: width of the main head.
    """

    crop: int
    short_side: int
    head_channels: int


def segment(config: SegmentConfig) -> dict[str, Any] | None:
    """Train to the end, or continue, and measure; the command's JSON (None in all processes but the first)."""
    _check(config)
    first = this_process().rank == 0 and os.environ.get("LOCAL_RANK", "0") == "0"
    data = find_data(config.data)
    settings = settle(config, RECIPE, len(data.train))
    torch.manual_seed(config.seed)
    opened = open_encoder(
        config.run, weights=config.weights, pretrained=config.pretrained, drop_path=config.drop_path, any_size=True
    )
    found = survey(data, opened.channels, quiet=not first)
    sizes = settle_sizes(config, opened, found)
    opened = at_crop(opened, sizes.crop)
    if first:
        print(announcement(data, found, opened, sizes, config.inference), flush=True)
    result = train_task(config, make_task(config, settings, data, found, opened, sizes), settings)
    return None if result is None else outcome(result, data, found)


def settle_sizes(config: SegmentConfig, opened: OpenedEncoder, found: Survey) -> Sizes:
    """The sizes that were asked for, or that follow from the encoder and the photos.

    Raises:
        InputError: a crop that is not made of whole patches.
    """
    patch = opened.patch_size
    least = LEAST_PATCHES * patch
    crop = config.crop_size or max(least, min(LARGEST_CROP, found.short_side) // patch * patch)
    if crop % patch or crop < least:
        raise InputError(
            f"--crop-size {crop}: not a multiple of the patch of {patch} px; take {max(least, crop // patch * patch)}"
        )
    short_side = crop if config.short_side is None else config.short_side
    return Sizes(crop, short_side, config.head_channels or int(opened.network.embed_dim))


def at_crop(opened: OpenedEncoder, crop: int) -> OpenedEncoder:
    """The encoder with positions for the crop's grid, resampled and then trained, so that only other sizes are resampled on the way."""
    opened.network.set_input_size(img_size=(crop, crop))
    return replace(opened, image_size=crop)


@dataclass(frozen=True)
class SegmentationStep:
    """A step: crops normalised, and the loss of both heads.

    Attributes:
        mean: by which crops are normalised.
        std: the same.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Scalars `loss`, `decode_loss`, `auxiliary_loss`.

        Args:
            model: float32 [B, K, S, S] -> scores of both heads.
            batch: uint8 [B, K, S, S] and uint8 [B, S, S].
        """
        images, masks = batch
        return segmentation_loss(model(normalise(images, self.mean, self.std)), masks)


def make_task(
    config: SegmentConfig,
    settings: Settings,
    data: SegmentationData,
    found: Survey,
    opened: OpenedEncoder,
    sizes: Sizes,
) -> Task:
    """What the frame trains and measures."""
    read = PairReader(data, len(found.names), opened.channels)
    augment = Augmentation(sizes.crop, sizes.short_side, tuple(round(255 * value) for value in opened.mean))
    description = {
        "encoder": opened.describe(),
        "segmentation": {**vars(sizes), "classes": list(found.names)},
        "photos": {"train": len(data.train), "val": len(data.val), "names_sha256": _digest(data)},
    }
    processes = max(config.devices, this_process().world_size)
    _check_batch(config, settings, processes)
    network: Any = synchronised(
        UperNet(opened.network, len(found.names), sizes.head_channels), resolve_device(config.device), processes
    )
    return Task(
        name="segment",
        network=network,
        train_set=TrainingCrops(data.train, read, augment, config.seed),
        step=SegmentationStep(opened.mean, opened.std),
        evaluate=_validation(config, WholePhotos(data.val, read, sizes.short_side), found.names, opened, sizes.crop),
        metric="miou",
        groups=adamw_groups(config, network, network.encoder),
        description=description,
        schedule=linear_schedule,
        collate=stack,
    )


def _validation(
    config: SegmentConfig, photos: WholePhotos, names: tuple[str, ...], opened: OpenedEncoder, crop: int
) -> Validation:
    assert config.out is not None
    window = crop if config.inference == "slide" else None
    return Validation(
        photos, names, opened.mean, opened.std, opened.patch_size, window, config.workers, config.pictures,
        config.out / SHEET_FILE, confusion_matrix(len(names)),
    )  # fmt: skip


def announcement(data: SegmentationData, found: Survey, opened: OpenedEncoder, sizes: Sizes, inference: str) -> str:
    """What was found and what follows from it, for people."""
    pairs = len(data.train) + len(data.val)
    read = (
        "all masks read"
        if found.decoded == pairs
        else f"ids read in {found.decoded} of {pairs} masks, the rest as they are used"
    )
    lines = [
        f"{data.root}: {len(data.train)} photos to train on, {len(data.val)} to measure; {len(found.names)} classes "
        f"({data.named_in or 'as many as the masks hold'}); {read}"
    ]
    if data.unused:
        lines.append(f"{data.unused} masks have no photo and are not used")
    if found.untrained:
        lines.append(f"no training mask that was read holds: {', '.join(found.untrained)}")
    depth, taps = len(opened.network.blocks), tapped_blocks(len(opened.network.blocks))
    resize = f"shorter sides brought to {sizes.short_side} px" if sizes.short_side else "photos at their own size"
    windows = "slid over val's photos" if inference == "slide" else "to train on, val's photos as a whole"
    lines.append(
        f"UperNet of {sizes.head_channels} channels on {opened.source}, after blocks {', '.join(map(str, taps))} of {depth}; "
        f"crops of {sizes.crop} px {windows}; {resize}; patch {opened.patch_size}"
    )
    return "\n".join(lines)


def outcome(result: Mapping[str, Any], data: SegmentationData, found: Survey) -> dict[str, Any]:
    """The command's JSON; on the way, the table for people."""
    classes = {name: result[CLASS_PREFIX + name] for name in found.names}
    print(table(found.names, list(classes.values())))
    print(
        f"{data.root}: mIoU {result['miou']:.2f} %, pixel accuracy {result['pixel_accuracy']:.2f} % on {len(data.val)} photos "
        f"(best mIoU {result['best_miou']:.2f} % after epoch {result['best_epoch']:g}, in {result['best']})"
    )
    figures = {name: value if value is None else round(value, 3) for name, value in classes.items()}
    others = {name: value for name, value in result.items() if not name.startswith(CLASS_PREFIX)}
    rounded = {name: round(others[name], 3) for name in ("miou", "pixel_accuracy", "best_miou")}
    return {
        **others,
        **rounded,
        "classes": figures,
        "images": len(data.val),
        "train": len(data.train),
        "val": len(data.val),
    }


def _check(config: SegmentConfig) -> None:
    if config.out is None:
        raise InputError("give --out DIR, the folder for what is trained")
    for least, names in ((1, ("crop_size", "head_channels")), (0, ("short_side", "pictures"))):
        for name in names:
            value = getattr(config, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")


def _check_batch(config: SegmentConfig, settings: Settings, processes: int) -> None:
    """UperNet pools a map to a single point, and normalises what it finds there over the images of a forward: one has no variance."""
    share = settings.batch_size // processes
    if share < 1 or share // micro_batches(share, config.micro_batch) < 2:
        raise InputError(
            f"--batch-size {settings.batch_size}, --micro-batch {config.micro_batch}: UperNet's batch norm needs "
            "two images or more in each forward of a device"
        )


def _digest(data: SegmentationData) -> str:
    """Of the photos' names, so that a run is not continued on other photos."""
    names = (str(pair.image.relative_to(data.root)) for pair in (*data.train, *data.val))
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
