"""`fastmae finetune`: train the whole encoder on labels, by MAE's recipe (Table 6)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.eva import Eva
from torch import nn

from fastmae.config import FinetuneConfig
from fastmae.errors import InputError
from fastmae.evaluate.classification import measure_classifier, shown_figures
from fastmae.evaluate.recipe import Recipe, settle
from fastmae.evaluate.transforms import (
    LabelledImages,
    Transform,
    centre_crop,
    crop_augmentation,
    full_augmentation,
)
from fastmae.outside.networks import create_network
from fastmae.probes.embed import check_pool
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.batch_memory import check_batch
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.wording import accuracies, counted, weight_count
from fastmae.student.feature_map import accepted_arguments
from fastmae.training.driver import train
from fastmae.training.evaluation import val_batches
from fastmae.training.optimiser import layer_decayed_groups
from fastmae.training.run import images_at_once
from fastmae.training.task import Evaluated, Settings, Task

log = logging.getLogger(__name__)
IMAGENET = Recipe(images=1_281_167, epochs=100, batch_size=1024, lr=2e-3, warmup_epochs=5, lr_power=0.25)
"""MAE's recipe for ViT-B (base learning rate 5e-4 for 256 images; Sec. 4.1.2). `lr_power` was chosen on 480 photos of
ten garments (batch 32, 50 epochs, an encoder of 4 x 128): learning rates of 3.5e-4 (power 0.5), 1e-3 and 3e-3 gave
38.3, 49.2 and 44.2 % on 120 photos held out of train/; power 0.25 gives 8.4e-4."""
HEAD_STD = 2e-5
"""Standard deviation of the classifier's initial weights, as in MAE."""


def finetune(config: FinetuneConfig, data: LabelledFolder | None = None) -> dict[str, Any] | None:
    """Train on train/, measure on val/; the command's JSON (None in all processes but the first).

    Args:
        config: the options.
        data: the labelled images; None: those of `config.data`.

    Raises:
        InputError: data or options that can't be used.
    """
    if config.out is None:
        raise InputError("give --out DIR, the folder for the trained model")
    data = data or open_labelled(config.data)
    settings = settle(config, IMAGENET, len(data.train))
    check_mixing(config, settings)
    torch.manual_seed(config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    check_batch(images_at_once(config, settings.batch_size), opened.channels, opened.image_size)
    result = train(config, finetuning_task(config, data, settings, opened), settings)
    if result is not None:
        log.info(
            f"{config.out}: {accuracies(result['top1'], result['top5'], len(data.classes))} "
            f"({counted(len(data.val), 'image')}, {len(data.classes)} classes); "
            f"best evaluation {result['best_top1']:.1f} % at epoch {result['best_epoch']:g}; "
            f"see {config.out}/confusion.png"
        )
    return result


def finetuning_task(config: FinetuneConfig, data: LabelledFolder, settings: Settings, opened: OpenedEncoder) -> Task:
    """The task for the training driver."""
    assert config.out is not None
    network, arguments = build_classifier(opened, len(data.classes), config.pool, config.drop_path)
    if config.checkpoint_activations:
        network.set_grad_checkpointing()
    weights = sum(parameter.numel() for parameter in network.parameters())
    augmentation = _augmentation(config, opened)
    return Task(
        name="finetune",
        out=config.out,
        headline=f"finetune: {weight_count(weights)}",
        network=network,
        dataset=LabelledImages(
            data.train, data.train_labels, opened.channels, augmentation, config.seed, opened.value_range
        ),
        step=ClassifierStep(_mixing(config, len(data.classes)), config.smoothing),
        parameter_groups=partial(layer_decayed_groups, network, network, config.weight_decay, config.layer_decay),
        description={"encoder": {**opened.describe(""), "arguments": arguments}, "data": data.describe()},
        evaluate=partial(_measure, config=config, data=data, opened=opened, batch_size=settings.batch_size),
        metric="top1",
        shown=shown_figures(len(data.classes)),
    )


def build_classifier(opened: OpenedEncoder, classes: int, pool: str, drop_path: float) -> tuple[Any, dict[str, Any]]:
    """The encoder as timm's own classifier.

    A ViT's: mean of the patch tokens, LayerNorm, linear layer; or the class token. Of any other network, the head that
    timm gives it; parts of that head which the encoder brings with it start as they are there.

    Returns:
        The network, float32 [B, K, S, S] -> [B, classes]; and the arguments with which timm builds it.

    Raises:
        InputError: the encoder has no class token, or timm gives the network no classifier.
    """
    encoder: Any = opened.network
    check_pool(encoder, pool)
    arguments = {**opened.arguments, "num_classes": classes}
    if opened.is_vit:
        arguments["global_pool"] = "avg" if pool == "mean" else "token"
        arguments["use_fc_norm" if isinstance(encoder, Eva) else "fc_norm"] = pool == "mean"
    regularised = accepted_arguments(opened.architecture, {"drop_path_rate": drop_path})
    if drop_path and not regularised:
        log.info(f"{opened.architecture} has no stochastic depth in timm: --drop-path {drop_path} has no effect")
    network: Any = create_network(opened.architecture, {**arguments, **regularised}, opened.source)
    loaded = network.load_state_dict(encoder.state_dict(), strict=False)
    if opened.is_vit:
        new_names = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
        assert set(loaded.missing_keys) <= new_names, loaded.missing_keys
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # the position embeddings too, which are fixed in pre-training
    classifier = network.get_classifier()
    if isinstance(classifier, nn.Linear):
        nn.init.trunc_normal_(classifier.weight, std=HEAD_STD)
        nn.init.zeros_(classifier.bias)
    return network, arguments


@dataclass
class ClassifierStep:
    """Mix the images, if asked for, and compute the cross entropy with smoothed labels.

    Attributes:
        mixing: timm's mixup and cutmix, which also smooth the labels; None: no mixing.
        smoothing: label smoothing without mixing.
    """

    mixing: Mixup | None
    smoothing: float

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The scalar `loss`.

        Args:
            model: [B, K, S, S] -> [B, classes].
            batch: images [B, K, S, S], and labels int64 [B].
        """
        images, labels = batch
        if self.mixing is not None:
            images, targets = self.mixing(images, labels)
            return {"loss": SoftTargetCrossEntropy()(model(images).float(), targets)}
        return {"loss": LabelSmoothingCrossEntropy(self.smoothing)(model(images).float(), labels)}


def _mixing(config: FinetuneConfig, classes: int) -> Mixup | None:
    if not _mixes(config):
        return None
    return Mixup(
        config.mixup,
        config.cutmix,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=config.smoothing,
        num_classes=classes,
    )


def _mixes(config: FinetuneConfig) -> bool:
    return config.augment == "full" and bool(config.mixup or config.cutmix)


def check_mixing(config: FinetuneConfig, settings: Settings) -> None:
    """Check that the images of a batch can be mixed in pairs, if they are to be.

    Raises:
        InputError: a batch of an odd number of images.
    """
    if _mixes(config) and settings.batch_size % 2:
        raise InputError(
            f"--batch-size {settings.batch_size}: mixup and cutmix mix pairs of images; give an even number, or "
            "--mixup 0 --cutmix 0"
        )


def _augmentation(config: FinetuneConfig, opened: OpenedEncoder) -> Transform:
    if config.augment == "full":
        return full_augmentation(opened, config.rand_augment, config.erasing)
    return crop_augmentation(opened) if config.augment == "crop" else centre_crop(opened)


def _measure(
    network: nn.Module,
    fabric: Fabric,
    *,
    config: FinetuneConfig,
    data: LabelledFolder,
    opened: OpenedEncoder,
    batch_size: int,
) -> Evaluated:
    assert config.out is not None
    images = LabelledImages(
        data.val, data.val_labels, opened.channels, centre_crop(opened), value_range=opened.value_range
    )
    batches = val_batches(images, fabric, batch_size // fabric.world_size, config.workers)
    return measure_classifier(network, batches, data.classes, fabric, config.out / "confusion.png")
