"""What is exported, what it gives, and what each format has to offer."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.config.exporting import ExportConfig
from fastmae.errors import InputError
from fastmae.runs.encoder import OpenedEncoder

EMBEDDING, PATCHES, CLASS, LOGITS = "embedding", "patch_tokens", "class_token", "logits"


@dataclass(frozen=True)
class Exported(OpenedEncoder):
    """An encoder on its way out, or a classifier.

    Attributes:
        classes: names of a classifier's classes, in the order of its logits; empty for an encoder.
        crop: which part of a picture it takes, 'whole' (squeezed into a square) or 'center'.
        crop_share: side of that part, as a share of the picture's shorter side.
    """

    classes: tuple[str, ...] = ()
    crop: str = "whole"
    crop_share: float = 1.0

    @property
    def dim(self) -> int:
        """Width of its features."""
        return int(self.network.embed_dim)

    @property
    def shape(self) -> str:
        """Of an image, for comments."""
        return f"{self.channels}, {self.image_size}, {self.image_size}"


@dataclass(frozen=True)
class Format:
    """A way to write an encoder.

    Attributes:
        library: its name on the hub.
        check: raises an InputError where this one can't be written so, or a package is missing; before anything is done.
        write: its files into a folder.
        read: (folder, images [B, K, S, S]) -> some of what `outputs_of` gives, by the library alone, as the user will have it.
        usage: (encoder, folder as it stands in the code) -> lines of Python that load the folder and put `images` through it.
    """

    library: str
    check: Callable[[Exported], None]
    write: Callable[[Exported, Path, ExportConfig], None]
    read: Callable[[Path, torch.Tensor], dict[str, torch.Tensor]]
    usage: Callable[[Exported, str], str]


def outputs_of(network: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a timm ViT makes of images.

    Args:
        network: in evaluation mode.
        images: float32 [B, K, S, S], normalised.

    Returns:
        The embedding [B, D], pooled as the network pools (the mean of the patch tokens, of what is trained here); the patch tokens
        [B, N, D], after the norm that stands before pooling; and, where there are such, the class token [B, D] and logits [B, classes].
    """
    tokens = network.forward_features(images)
    outputs = {
        EMBEDDING: network.forward_head(tokens, pre_logits=True),
        PATCHES: tokens[:, network.num_prefix_tokens :],
    }
    if network.cls_token is not None:
        outputs[CLASS] = tokens[:, 0]
    if network.num_classes > 0:
        outputs[LOGITS] = network.head(outputs[EMBEDDING])
    return outputs


def package(name: str) -> Any:
    """An optional package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this format needs {name}; pip install 'fastmae[export]'") from error
