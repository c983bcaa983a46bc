"""Options of the commands that say what frozen features are worth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.common import Common


@dataclass(kw_only=True)
class KnnConfig(Common):
    """k-nearest-neighbour accuracy of frozen features: train/ votes on val/."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """A run's folder or checkpoint, an exported model, timm/NAME, a checkpoint of MAE's, DINO's or iBOT's own, or a teacher
    (efficientnet-lite0, hf/NAME)."""
    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """Folder with train/<class>/* and val/<class>/*."""
    features: Literal["encoder", "random", "teacher"] = "encoder"
    """Of a run: its trained encoder, the same encoder at random (the floor), or its store's teacher (the ceiling)."""
    pool: Literal["mean", "class"] = "mean"
    """Mean of the patch tokens, or the class token."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""
    image_size: int | None = None
    """Side in pixels; default: the encoder's own."""
    pretrained: bool = True
    """--no-pretrained takes the same network at random."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    block: int | None = None
    """Which block's output, for a teacher; default: the run's, or the last."""
    batch_size: int = 64
    """Images a forward."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""
