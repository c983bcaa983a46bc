"""Options of `fastmae tokenize`."""

from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.common import BLOCK, DEFAULT_TEACHER, PIXELS, Common, Precision
from fastmae.config.options import options
from fastmae.config.ranges import BATCH, COUNT, DEPTH, JPEG_QUALITY, PATCH, PROCESSES, VALUES, WORKERS, Range
from fastmae.config.resolve import numbers, shown
from fastmae.config.teacher import TeacherName
from fastmae.errors import InputError
from fastmae.outside.codec_names import parse_codec

AUTO = "auto"
"""The value of an option that is settled by measuring (`offline.settle`)."""


@options
class TokenizeConfig(Common):
    """Run a teacher once over every image and keep its patch features in a token store (Sec. 3.2)."""

    images: Path
    """Folder of images, nested or flat; a list of paths (.txt, .csv, .parquet); a folder of webdataset tar shards; or a
    folder that Hugging Face datasets saved."""
    store: Path
    """Folder on this machine to write. The same call again continues an interrupted one."""
    teacher: TeacherName = DEFAULT_TEACHER
    """timm/NAME (any timm model), hf/NAME (a vision model of transformers, by hub name or folder), clip/NAME (ViT-B-16,
    ...), file/PATH (a checkpoint of MAE, DINO or iBOT as its authors publish it), python/MODULE:FUNCTION (code of your
    own, which is run), efficientnet-lite0 or efficientnet-lite2 (these two need no network)."""
    teacher_weights: Path | None = None
    """Weights file for a timm/NAME teacher instead of the hub's: safetensors, or a PyTorch file without code in it."""
    teacher_block: Annotated[int | None, BLOCK] = None
    """The block whose output is kept, counted from 0, or from -1 backwards; for a CNN, the stage. Default: the last."""
    teacher_last: Annotated[int, DEPTH] = 1
    """Average the outputs of this many blocks of a ViT, up to the chosen block."""
    teacher_norm: Literal["auto", "final", "layer", "none"] = "auto"
    """Norm over the features: the teacher's own final norm, a LayerNorm without parameters, or none. auto: final for
    the last block of a ViT, layer for its other blocks, none for a CNN."""
    teacher_size: Annotated[int | None, PIXELS] = None
    """Side of the teacher's input in pixels. Default: the size that gives the teacher the store's grid."""
    precision: Precision = "auto"
    """Precision of the teacher; the store records it. auto: 32-true on a CPU; on a GPU bf16-mixed if the tokens of the
    first images keep a cosine of 0.999 to fp32's, else tf32 or 32-true. A store that was begun keeps its own."""
    middle_size: str = "352"
    """Side of the middle image in pixels (Sec. 3.2.3). Several sizes (256,352,448) keep each picture at each size, and
    a view draws its scale."""
    patch_size: Annotated[int, PATCH] = 16
    """Side of a patch in pixels (Sec. 4.1.1)."""
    channels: Annotated[int, Range(ge=1, le=1024)] = 3
    """Image channels as the student will see them: 3 for RGB, 1 for grey; any other number is read from .npy files
    [H, W, channels] or from images with as many bands."""
    teacher_channels: str = ""
    """The channels that the teacher takes as red, green and blue. Default: 0,1,2 for RGB, 0,0,0 for grey."""
    resize: Literal["whole", "center-crop"] = "whole"
    """Squeeze the whole picture into the square, or crop its centre."""
    value_range: Annotated[Literal["auto", "file", "set"] | tuple[float, float], VALUES] = "auto"
    """The values of 16-bit, integer and float images that become black and white. auto: their type's range. file: each
    image's own percentiles, 0.5 and 99.5. set: those of a sample of the images. Or two numbers: -1000 400 for
    Hounsfield units, say. The store records it."""
    codec: str = "fp16"
    """Storage of a token: fp32, fp16, int8, or pq<M> for product quantisation to M bytes (pq48, say). auto: the
    smallest one whose tokens keep a cosine of 0.95 on a sample of the images."""
    codec_images: Annotated[int, COUNT] = 512
    """Number of images from which int8 and pq<M> learn."""
    flips: Literal["approximate", "stored"] = "approximate"
    """Tokens of a flipped view: the mirrored grid, or the teacher's features of the mirrored image (twice the time and
    the disk)."""
    pixels: Literal["jpeg", "raw"] = "jpeg"
    """Storage of the middle images."""
    jpeg_quality: Annotated[int, JPEG_QUALITY] = 90
    """JPEG quality of the middle images."""
    shard_size: Annotated[int, Range(ge=1, le=1 << 20)] = 256
    """Images per shard: what a kill loses at most, and what is held in memory."""
    batch_size: Annotated[int, BATCH] = 32
    """Images per forward pass of the teacher."""
    workers: Annotated[int, WORKERS] = -1
    """Decoding processes; -1: all cores but two, at least one."""
    rank: Annotated[int | None, Range(ge=0, lt=1 << 20)] = None
    """Number of this process, from 0, among several that fill one store. Default: from torchrun or srun, or 0."""
    world_size: Annotated[int | None, PROCESSES] = None
    """Number of processes or machines that fill the store together; they share only its folder. Default: from torchrun
    or srun, or 1."""
    to: str | None = None
    """URL to which the finished store is copied, as `fastmae upload STORE URL` does. The same call again continues."""
    strict: bool = False
    """Stop at the first file that can't be decoded instead of skipping it."""
    add: bool = False
    """Extend a finished store by the images of IMAGES that it does not hold yet."""
    dry_run: bool = False
    """Measure on a few images how large the store will be and how long it will take. Nothing is written."""

    inputs = ("images",)

    def check(self) -> None:
        """See `Options`."""
        if isinstance(self.value_range, tuple) and self.value_range[0] >= self.value_range[1]:
            low, high = self.value_range
            raise InputError(f"--value-range {low:g} {high:g}: give the smaller one first")
        teacher_channels(self)
        middle_sizes(self)
        if self.pixels == "jpeg" and self.channels not in (1, 3):
            raise InputError(f"--channels {self.channels}: a JPEG holds 1 or 3; take --pixels raw")
        if self.codec != AUTO:
            parse_codec(self.codec)
        if (self.rank is None) != (self.world_size is None):
            raise InputError("--rank and --world-size go together; give both or neither")
        if self.rank is not None and self.world_size is not None and not 0 <= self.rank < self.world_size:
            raise InputError(f"--rank {self.rank}: give 0 to {self.world_size - 1} for --world-size {self.world_size}")


def middle_sizes(config: "TokenizeConfig") -> list[int]:
    """`--middle-size` as numbers of pixels, smallest first.

    Raises:
        InputError: no whole numbers, or a size that is no multiple of the patch size.
    """
    sizes = sorted({*numbers(Annotated[int, PIXELS], config.middle_size, "--middle-size")})
    patch_size = config.patch_size
    for size in sizes:
        if size < patch_size or size % patch_size:
            nearest = max(1, round(size / patch_size)) * patch_size
            raise InputError(f"--middle-size {size}: not a multiple of --patch-size {patch_size}; take {nearest}")
    return sizes


def teacher_channels(config: "TokenizeConfig") -> tuple[int, ...]:
    """`--teacher-channels`: the three image channels that the teacher takes as red, green and blue.

    Raises:
        InputError: not three of the channels, or none named for images that are neither RGB nor grey.
    """
    if not config.teacher_channels:
        if config.channels not in (1, 3):
            raise InputError(
                f"--channels {config.channels}: say which of them the teacher sees as red, green and blue: "
                "--teacher-channels 0,1,2"
            )
        return (0, 1, 2) if config.channels == 3 else (0, 0, 0)
    kind = Annotated[int, Range(ge=0, lt=config.channels)]
    channels = numbers(kind, config.teacher_channels, "--teacher-channels")
    if len(channels) != 3:
        raise InputError(f"--teacher-channels {shown(config.teacher_channels)}: give three numbers, as 0,1,2")
    return channels
