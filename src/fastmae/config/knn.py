"""Options of `fastmae knn`."""

from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.common import BLOCK, PIXELS, Common
from fastmae.config.options import options
from fastmae.config.ranges import BATCH, NEIGHBOURS, TEMPERATURE, WORKERS
from fastmae.config.teacher import OptionalTeacherName, TeacherName
from fastmae.errors import InputError


@options
class KnnConfig(Common):
    """k-nearest-neighbour accuracy of frozen features: train/ votes on val/."""

    run: TeacherName
    """A run's folder or checkpoint, an exported model, timm/NAME, a checkpoint of MAE, DINO or iBOT, or a teacher
    (efficientnet-lite0, hf/NAME, python/MODULE:FUNCTION)."""
    data: Path
    """Folder with train/<class>/* and val/<class>/*."""
    features: Literal["encoder", "random", "teacher"] = "encoder"
    """For a run: its trained encoder, the same encoder with random weights (the lower bound), or the teacher of its
    store (the upper bound)."""
    teacher: OptionalTeacherName = None
    """With --features teacher: where the teacher of the store is, if it is code (python/MODULE:FUNCTION) or a file that
    has moved. Its weights must be those that the store records."""
    pool: Literal["mean", "class"] = "mean"
    """Mean of the patch tokens, or the class token."""
    k: Annotated[int, NEIGHBOURS] = 20
    """Number of neighbours that vote. (DINO: 20)"""
    temperature: Annotated[float, TEMPERATURE] = 0.07
    """The weight of a neighbour's vote is exp(cosine / temperature). (DINO: 0.07)"""
    image_size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels. Default: the encoder's own."""
    pretrained: bool = True
    """--no-pretrained takes the same network with random weights."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    block: Annotated[int | None, BLOCK] = None
    """Block whose output is used. Default: the last, or the one that the run's teacher was tapped at."""
    batch_size: Annotated[int, BATCH] = 64
    """Images per forward pass."""
    workers: Annotated[int, WORKERS] = -1
    """Decoding processes; -1: all cores but two, at least one."""

    inputs = ("data",)

    def check(self) -> None:
        """See `Options`."""
        super().check()
        if self.teacher is not None and self.features != "teacher":
            raise InputError(
                f"--teacher {self.teacher}: goes with --features teacher; to measure it alone, give it as RUN"
            )
