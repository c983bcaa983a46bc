"""Options of `fastmae features`."""

from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.common import BLOCK, PIXELS, Common, Precision
from fastmae.config.options import options
from fastmae.config.ranges import BATCH, WORKERS
from fastmae.errors import InputError

SUFFIXES = (".safetensors", ".parquet")
"""Of the files that can be written."""


@options
class FeaturesConfig(Common):
    """Embed any set of images with an encoder: one vector per image, and with --dense one per patch."""

    run: str
    """A run's folder or checkpoint (of pretrain, or fine-tuned), an exported model, timm/NAME, or file/PATH."""
    images: Path
    """As in tokenize: a folder, a list of paths, tar shards, or a folder that Hugging Face datasets saved."""
    out: Path
    """File to write, .safetensors or .parquet; an existing file is replaced."""
    pool: Literal["mean", "class"] = "mean"
    """Vector of an image: the mean of its patch tokens, or its class token."""
    dense: bool = False
    """Also keep the patch tokens, as a grid (.safetensors only)."""
    block: Annotated[int | None, BLOCK] = None
    """Block whose output is used, counted from 0, or from -1 backwards. Default: the last. The final norm is always
    applied."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the written numbers."""
    image_size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels. Default: the encoder's own."""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU that supports it, 16-mixed on other GPUs, 32-true elsewhere. tf32: float32, but NVIDIA
    GPUs since Ampere round the factors of matrix products and convolutions to 10 bits."""
    batch_size: Annotated[int, BATCH] = 64
    """Images per forward pass."""
    workers: Annotated[int, WORKERS] = -1
    """Decoding processes; -1: all cores but two, at least one."""
    strict: bool = False
    """Stop at the first image that can't be decoded instead of skipping it."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    pretrained: bool = True
    """--no-pretrained takes the same architecture with random weights."""

    inputs = ("images",)

    def check_inputs(self) -> None:
        """See `Options`."""
        super().check_inputs()
        self.check_out()

    def check_out(self) -> None:
        """Check that features can be written to a file of this name.

        Raises:
            InputError: another kind of file, a folder, or a grid for Parquet.
        """
        if self.out.suffix not in SUFFIXES:
            raise InputError(f"{self.out}: give a file name that ends in {' or '.join(SUFFIXES)}")
        if self.out.is_dir():
            raise InputError(f"{self.out}: is a folder; give a file in it")
        if self.dense and self.out.suffix == ".parquet":
            raise InputError(
                f"{self.out}: --dense gives a grid of vectors per image, which a table holds badly; use .safetensors"
            )
