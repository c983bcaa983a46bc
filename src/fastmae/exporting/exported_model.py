"""The exported model, an encoder or a fine-tuned classifier, and the outputs that every format must reproduce."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from fastmae.errors import InputError
from fastmae.evaluate.transforms import CROP_RATIO
from fastmae.outside.documents import checked
from fastmae.outside.networks import network_of
from fastmae.runs.description import WAY_OUT
from fastmae.runs.encoder import OpenedEncoder
from fastmae.runs.folder import RUN_FILE
from fastmae.runs.load import load_run
from fastmae.runtime.wording import counted
from fastmae.student.encoder import Encoder, is_plain_vit
from fastmae.student.feature_map import last_map, resized_network

EMBEDDING, PATCHES, CLASS, MAP, LOGITS = "embedding", "patch_tokens", "class_token", "feature_map", "logits"
"""Names of the outputs."""


@dataclass(frozen=True)
class ExportedModel(OpenedEncoder):
    """An encoder or a classifier, and how its images are prepared.

    Attributes:
        classes: the classifier's class names, in the order of the logits; empty for an encoder.
        crop: which part of a picture the model sees: 'whole' (squeezed into a square) or 'center'.
        crop_share: side of the middle crop, as a share of the picture's shorter side.
    """

    classes: tuple[str, ...] = ()
    crop: str = "whole"
    crop_share: float = 1.0

    @property
    def image_shape(self) -> str:
        """Channels, height and width of an image, as text for shape comments."""
        return f"{self.channels}, {self.image_size}, {self.image_size}"

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output without the batch."""
        with torch.inference_mode():
            outputs = model_outputs(self.network, torch.zeros(1, self.channels, self.image_size, self.image_size))
        return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


class LabelledData(msgspec.Struct):
    """The part `data` of a fine-tuned run's description."""

    classes: list[str]


def encoder_to_export(opened: OpenedEncoder) -> ExportedModel:
    """The encoder without a classifier. Its pictures are resized as in pre-training."""
    opened.network.reset_classifier(0)
    sized = opened.at_size(opened.image_size)
    fields = {**vars(sized), "arguments": {**sized.arguments, "num_classes": 0}}
    return ExportedModel(**fields, crop="whole" if opened.resize == "whole" else "center")


def classifier_to_export(opened: OpenedEncoder) -> ExportedModel:
    """A fine-tuned run's encoder with its classifier. Its pictures are cropped as when its accuracy was measured.

    Raises:
        InputError: the encoder does not come from a fine-tuned run.
    """
    path = Path(opened.source)
    is_run = path.is_file() or (path / RUN_FILE).is_file()
    description, weights = load_run(path) if is_run else ({}, {})
    arguments = description.get("encoder", {}).get("arguments", {})
    if description.get("task") != "finetune" or not arguments.get("num_classes"):
        raise InputError(
            f"--classifier: {opened.source} is not a run of `fastmae finetune`; leave it out to export the encoder"
        )
    network: Encoder = network_of(opened.architecture, arguments, path, weights)
    size = opened.image_size
    if size != description["encoder"]["image_size"]:
        if opened.is_vit:
            network.set_input_size(img_size=(size, size))
        else:
            network = resized_network(opened.source, network, opened.architecture, arguments, size)
    sized = replace(opened, network=network.eval(), arguments=arguments).at_size(size)
    fields = vars(sized)
    classes = checked(description.get("data"), LabelledData, name=path, way_out=WAY_OUT).classes
    if len(classes) != arguments["num_classes"]:
        raise InputError(
            f"{path}: names {counted(len(classes), 'class', 'classes')} for {arguments['num_classes']} outputs; "
            f"{WAY_OUT}"
        )
    return ExportedModel(**fields, classes=tuple(classes), crop="center", crop_share=CROP_RATIO)


def model_outputs(network: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of timm's network.

    Args:
        network: in evaluation mode.
        images: float32 [B, K, S, S], normalised.

    Returns:
        Of a plain ViT:
        `EMBEDDING` [B, D]: the network's own pooling, which for encoders trained here is the mean of the patch tokens.
        `PATCHES` [B, N, D]: the patch tokens after the last norm before pooling.
        `CLASS` [B, D]: the class token, if the network has one.

        Of any other network:
        `EMBEDDING` [B, D]: the mean of the last map.
        `MAP` [B, D, h, w]: the last map, after the network's final norm.

        `LOGITS` [B, classes]: only for a classifier.
    """
    if not is_plain_vit(network):
        feature_map = last_map(network, images)
        outputs = {EMBEDDING: feature_map.mean((2, 3)), MAP: feature_map}
        return {**outputs, LOGITS: network(images)} if network.num_classes > 0 else outputs
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
