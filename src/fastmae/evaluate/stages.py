"""The maps of strides 4, 8, 16 and 32 that segmentation and detection read from a network that is not a plain ViT."""

from dataclasses import dataclass

import torch

from fastmae.errors import InputError
from fastmae.runs.encoder import OpenedEncoder
from fastmae.student.encoder import Encoder
from fastmae.student.feature_map import TIMM_ERRORS, freeze_unread, maps_of_stages, pyramid_stages

STRIDES = (4, 8, 16, 32)
TRIED_SIZE = (64, 96)
"""Height and width of the empty image with which a network shows that it takes any size, in pixels."""


@dataclass(frozen=True)
class Stages:
    """The stages that are read.

    Attributes:
        numbers: of timm's stages, the finest map first.
        widths: channels of their maps.
    """

    numbers: tuple[int, ...]
    widths: tuple[int, ...]

    def maps(self, encoder: Encoder, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [B, K, H, W] -> four maps [B, width, H / stride, W / stride]."""
        return maps_of_stages(encoder, images, self.numbers)


def trainable_stages(opened: OpenedEncoder) -> Stages:
    """The stages of an encoder. All that its maps depend on will be trained, and nothing else.

    Raises:
        InputError: the network has no such maps, or takes images of one size only.
    """
    network = opened.network
    numbers = pyramid_stages(network, STRIDES)
    if numbers is None:
        raise InputError(
            f"{opened.source}: {opened.architecture} has no maps of strides {', '.join(map(str, STRIDES))}; give a "
            "plain ViT, or a network with such a pyramid, as a ResNet or a ConvNeXt"
        )
    parameter = next(network.parameters())
    image = torch.zeros(1, opened.channels, *TRIED_SIZE, device=parameter.device)
    try:
        with torch.no_grad():
            maps = Stages(tuple(numbers), ()).maps(network, image)
    except TIMM_ERRORS as error:
        raise InputError(
            f"{opened.source}: {opened.architecture} takes images of {opened.image_size} px alone, and photos have "
            "many sizes; give another network"
        ) from error
    stages = Stages(tuple(numbers), tuple(feature_map.shape[1] for feature_map in maps))
    network.requires_grad_(True)
    freeze_unread(network, lambda images: stages.maps(network, images), opened.image_size, opened.channels)
    return stages
