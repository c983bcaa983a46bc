"""`fastmae finetune`: the whole encoder trained on labels, by MAE's recipe (Table 6; Bao et al. 2022 for the decay by layers)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.eva import Eva
from torch import nn

from fastmae.config import FinetuneConfig
from fastmae.errors import InputError
from fastmae.evaluate.classification import measure_classifier
from fastmae.evaluate.supervised import Recipe, Settings, adamw_groups, evaluation_batches, settle, train_task
from fastmae.evaluate.transforms import LabelledPictures, crop_augmentation, full_augmentation, middle_crop
from fastmae.probes.labelled import LabelledFolder, open_labelled
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.fabric import Fabric
from fastmae.training.task import Task

IMAGENET = Recipe(images=1_281_167, epochs=100, batch_size=1024, lr=2e-3, warmup_epochs=5, lr_power=0.25)
"""MAE's for ViT-B (base rate 5e-4 for 256 images; paper Sec. 4.1.2). On 480 photos of ten garments, batch 32, 50 epochs, an encoder of
4 x 128 came to 38.3, 49.2 and 44.2 % of 120 held out of train/ at rates of 3.5e-4 (power 0.5), 1e-3 and 3e-3; 0.25 gives 8.4e-4."""
HEAD_DEVIATION = 2e-5
"""Of the classifier's weights at the start."""


def finetune(config: FinetuneConfig) -> dict[str, Any] | None:
    """Train on train/, measure on val/; the command's JSON.

    Raises:
        InputError: data or options that can't be used.
    """
    data = open_labelled(config.data)
    settings = settle(config, IMAGENET, len(data.train))
    _check(config, settings)
    torch.manual_seed(config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    network, arguments = build_classifier(opened, len(data.classes), config.pool, config.drop_path)
    task = Task(
        name="finetune",
        network=network,
        train_set=LabelledPictures(
            data.train, data.train_labels, opened.channels, _augmentation(config, opened), config.seed
        ),
        step=ClassifierStep(_mixing(config, len(data.classes)), config.smoothing),
        evaluate=partial(_measure, config=config, data=data, opened=opened, batch_size=settings.batch_size),
        metric="top1",
        groups=adamw_groups(config, network, network),
        description={"encoder": {**opened.describe(""), "arguments": arguments}, "data": data.describe()},
    )
    result = train_task(config, task, settings)
    if result is not None:
        figures = f"top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} % ({len(data.val)} images, {len(data.classes)} classes)"
        best = f"best evaluation {result['best_top1']:.1f} % at epoch {result['best_epoch']:g}"
        print(f"{config.out}: {figures}; {best}; see {config.out}/confusion.png")
    return result


def build_classifier(
    opened: OpenedEncoder, classes: int, pool: str, drop_path: float
) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder as timm's own classifier: mean of the patch tokens (or the class token, normed as it was), LayerNorm, linear layer.

    Returns:
        The network, float32 [B, K, S, S] -> [B, classes]; and the arguments by which timm builds it.

    Raises:
        InputError: no class token to read.
    """
    old: Any = opened.network
    if pool == "class" and getattr(old, "cls_token", None) is None:
        raise InputError("--pool class: this encoder has no class token; take --pool mean")
    pooling: dict[str, Any] = {"global_pool": "avg" if pool == "mean" else "token"}
    pooling["use_fc_norm" if isinstance(old, Eva) else "fc_norm"] = pool == "mean"
    arguments = {**opened.arguments, "num_classes": classes, **pooling}
    network: Any = timm.create_model(opened.architecture, **arguments, drop_path_rate=drop_path)
    found = network.load_state_dict(old.state_dict(), strict=False)
    fresh = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(found.missing_keys) <= fresh, found.missing_keys
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # positions too, which stand still in pre-training
    nn.init.trunc_normal_(network.head.weight, std=HEAD_DEVIATION)
    nn.init.zeros_(network.head.bias)
    return network, arguments


@dataclass
class ClassifierStep:
    """A step: images mixed, if at all, and cross entropy with smooth labels.

    Attributes:
        mixing: timm's, which smooths the labels too; None: not mixed.
        smoothing: of the labels.
    """

    mixing: Mixup | None
    smoothing: float

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Scalar `loss`.

        Args:
            model: [B, K, S, S] -> [B, classes].
            batch: images, and labels int64 [B].
        """
        images, labels = batch
        if self.mixing is not None:
            images, targets = self.mixing(images, labels)
            return {"loss": SoftTargetCrossEntropy()(model(images).float(), targets)}
        return {"loss": LabelSmoothingCrossEntropy(self.smoothing)(model(images).float(), labels)}


def _mixing(config: FinetuneConfig, classes: int) -> Mixup | None:
    if config.augment != "full" or not (config.mixup or config.cutmix):
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


def _augmentation(config: FinetuneConfig, opened: OpenedEncoder) -> Callable[[Any], torch.Tensor]:
    if config.augment == "full":
        return full_augmentation(opened, config.rand_augment, config.erasing)
    return crop_augmentation(opened) if config.augment == "crop" else middle_crop(opened)


def _measure(
    network: nn.Module,
    fabric: Fabric,
    *,
    config: FinetuneConfig,
    data: LabelledFolder,
    opened: OpenedEncoder,
    batch_size: int,
) -> Mapping[str, float]:
    pictures = LabelledPictures(data.val, data.val_labels, opened.channels, middle_crop(opened))
    batches = evaluation_batches(pictures, len(data.val), fabric, batch_size // fabric.world_size, config.workers)
    assert config.out is not None
    return measure_classifier(network, batches, data.classes, fabric, config.out / "confusion.png")


def _check(config: FinetuneConfig, settings: Settings) -> None:
    for name in ("erasing", "smoothing"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise InputError(f"--{name} {value}: give 0 to below 1")
    for name in ("mixup", "cutmix"):
        value = getattr(config, name)
        if not 0 <= value < float("inf"):
            raise InputError(f"--{name} {value}: give 0 or more")
    if config.augment == "full" and (config.mixup or config.cutmix) and settings.batch_size % 2:
        raise InputError(
            f"--batch-size {settings.batch_size}: mixup and cutmix pair the images; give an even one, or --mixup 0 --cutmix 0"
        )
