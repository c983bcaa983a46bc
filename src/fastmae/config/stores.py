"""Options of the commands that make token stores and look after them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.common import DEFAULT_TEACHER, Common


@dataclass(kw_only=True)
class TokenizeConfig(Common):
    """Run a teacher once over every image and keep its patch features in a token store (Sec. 3.2)."""

    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """Folder of images, nested or flat; a list of paths (.txt, .csv, .parquet); webdataset tar shards (their folder); or a folder
    that Hugging Face datasets saved."""
    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """Folder to write; the same call again continues an interrupted one."""
    teacher: str = DEFAULT_TEACHER
    """timm/NAME (any timm model), hf/NAME (a vision model of transformers, by hub name or folder), clip/NAME (ViT-B-16, ...),
    file/PATH (a checkpoint of MAE, DINO or iBOT as its authors publish it), efficientnet-lite0 or efficientnet-lite2 (need no network)."""
    teacher_weights: Path | None = None
    """Weights file for a timm/NAME teacher, instead of the hub's: safetensors, or a PyTorch file without pickled code."""
    teacher_block: int | None = None
    """Which block's output to keep, counted from 0, or from -1 backwards; for a CNN, which stage. Default: the last."""
    teacher_last: int = 1
    """Average the outputs of this many of a ViT's blocks, up to the tapped one."""
    teacher_norm: Literal["auto", "final", "layer", "none"] = "auto"
    """Norm over the tapped features: the teacher's own final one, a LayerNorm without parameters, or none.
    auto: final for a ViT's last block, layer for its others, none for a CNN."""
    teacher_size: int | None = None
    """Side in pixels at which the teacher sees the middle image. Default: so that its grid is the store's."""
    middle_size: str = "352"
    """Side of the middle image in pixels (Sec. 3.2.3); several (256,352,448) keep each picture at each, and a view draws its scale."""
    patch_size: int = 16
    """Side of a patch in pixels (Sec. 4.1.1)."""
    channels: int = 3
    """Of the images, as the student will see them: 3 RGB, 1 grey, another number from .npy files [H, W, channels] or images of
    as many bands."""
    teacher_channels: str = ""
    """Which of them the teacher takes as red, green and blue. Default: 0,1,2 of RGB, 0,0,0 of grey."""
    resize: Literal["whole", "center-crop"] = "whole"
    """Squeeze the whole picture into the square, or cut its centre out of it."""
    codec: str = "fp16"
    """How a token lies on disk: fp32, fp16, int8, or pq<M>: M bytes each, product-quantised (pq48, say)."""
    codec_images: int = 512
    """Images on whose tokens int8 and pq<M> learn."""
    flips: Literal["approximate", "stored"] = "approximate"
    """A flipped view's tokens: the grid mirrored, or the teacher's own of the mirrored image (twice the time and the disk)."""
    pixels: Literal["jpeg", "raw"] = "jpeg"
    """How the middle images are kept."""
    jpeg_quality: int = 90
    """1 to 100."""
    shard_size: int = 256
    """Images a shard: what a kill loses at most, and what is held in memory."""
    batch_size: int = 32
    """Images a teacher forward."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""
    rank: int | None = None
    """Number of this process among several that fill one store, from 0. Default: torchrun's or srun's, or 0."""
    world_size: int | None = None
    """How many processes or machines fill the store together, with nothing between them but its folder. Default: torchrun's
    or srun's, or 1."""
    strict: bool = False
    """Stop at the first file that can't be decoded, instead of skipping it."""
    add: bool = False
    """Extend a finished store by the images of IMAGES that it does not hold yet."""
    dry_run: bool = False
    """Measure on a few images how big the store will be and how long it will take; write nothing."""


@dataclass(kw_only=True)
class InspectConfig(Common):
    """Say what a token store holds."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The token store."""


@dataclass(kw_only=True)
class VerifyConfig(Common):
    """Re-read every byte of a token store and check it; name what is damaged, and with --repair make it again from the images."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The token store."""
    repair: bool = False
    """Make just the damaged parts again, from the images and the teacher that the store names."""
    batch_size: int = 32
    """Images a teacher forward, in a repair; as in tokenize, for the same bytes."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""
