"""Options of `fastmae linear`."""

from typing import Annotated, Literal

from fastmae.config.common import BLOCK, PIXELS
from fastmae.config.options import options
from fastmae.config.ranges import WEIGHT_OR_0
from fastmae.config.resolve import flag
from fastmae.config.supervised import SupervisedConfig
from fastmae.errors import InputError


@options
class LinearConfig(SupervisedConfig):
    """Linear probe by MAE's recipe: frozen features, BatchNorm without parameters, one linear layer (Table 6)."""

    image_size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels. Default: the encoder's own."""
    pool: Literal["mean", "class"] = "mean"
    """Mean of the patch tokens, or the class token (MAE's choice)."""
    block: Annotated[int | None, BLOCK] = None
    """Block whose output is used, counted from 0, or from -1 backwards. Default: the last. The final norm is always
    applied."""
    weight_decay: Annotated[float, WEIGHT_OR_0] = 0.0
    """Weight decay of the linear layer."""
    augment: Literal["crop", "none"] = "none"
    """crop: random crops and flips, with a forward pass of the encoder for each (as MAE); none: features are computed
    once, which takes minutes."""
    solver: Literal["lars", "logistic"] = "lars"
    """lars: MAE's optimizer; logistic: logistic regression, run to convergence on features computed once (by
    scikit-learn; on a GPU, the same objective there)."""

    def check(self) -> None:
        """Refuse options that contradict each other."""
        super().check()
        for name in ("betas", "layer_decay", "drop_path", "checkpoint_activations"):
            if getattr(self, name) != getattr(type(self), name):
                raise InputError(f"{flag(name)}: has no effect on a linear probe by LARS; leave it out")
        if self.augment == "none" and self.devices > 1:
            raise InputError("--augment none: features are computed once, in one process; give --devices 1")
        if self.out is not None and self.solver == "logistic":
            raise InputError("--out: --solver logistic writes nothing; leave it out, or use --solver lars")
        if self.augment == "crop" and self.solver == "logistic":
            raise InputError("--solver logistic: needs fixed features; use --augment none")
