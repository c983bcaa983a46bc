"""What is read of config.json, which describes a model in timm's hub layout, and its types."""

from typing import Annotated, Any

import msgspec

from fastmae.images.value_range import AUTO, bounds_of
from fastmae.runs.description import Resize, Side, check_normalisation

EXPORT_CONFIG, EXPORT_WEIGHTS = "config.json", "model.safetensors"
"""Files of a folder in timm's hub layout."""


class Preprocessing(msgspec.Struct):
    """The part `pretrained_cfg` of timm's config.json: what the network's images are."""

    input_size: Annotated[list[Side], msgspec.Meta(min_length=3, max_length=3)]
    mean: list[float]
    std: list[float]
    num_classes: int | None = None
    global_pool: str | None = None
    fixed_input_size: bool = False

    def __post_init__(self) -> None:
        check_normalisation(self.mean, self.std, self.channels)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.input_size[0]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.input_size[-1]


class Prepared(msgspec.Struct):
    """The part `fastmae` of an export's config.json: how pictures become the network's images."""

    resize: Resize = "whole"
    value_range: str = AUTO

    def __post_init__(self) -> None:
        bounds_of(self.value_range)


class TimmConfig(msgspec.Struct):
    """config.json in timm's hub layout. `architecture` and `model_args` are checked when the network is built."""

    architecture: str
    pretrained_cfg: Preprocessing
    model_args: dict[str, Any] = {}
    num_classes: int | None = None
    global_pool: str | None = None
    fastmae: Prepared | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments that build the network. What `model_args` leaves out, timm takes from elsewhere in the file."""
        if self.fastmae is not None:  # complete
            return {"num_classes": 0, **self.model_args}
        own = self.pretrained_cfg
        elsewhere = {
            "num_classes": own.num_classes if self.num_classes is None else self.num_classes,
            "global_pool": self.global_pool or own.global_pool,
            "in_chans": own.channels,
            "img_size": own.image_size if own.fixed_input_size else None,
        }
        return {
            "num_classes": 0,
            **{key: value for key, value in elsewhere.items() if value is not None},
            **self.model_args,
        }
