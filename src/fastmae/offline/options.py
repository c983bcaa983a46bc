"""What the options of `tokenize` mean together: sizes and channels out of their strings, combinations that are refused,
this process's share of the shards, and the teacher and store description that follow from the options."""

from typing import Annotated, Any, NamedTuple

import torch

from fastmae.config import TokenizeConfig
from fastmae.config.common import PIXELS
from fastmae.config.ranges import Range
from fastmae.config.resolve import numbers, shown
from fastmae.errors import InputError
from fastmae.images.value_range import text_of
from fastmae.runtime.device import own_device, resolve_device
from fastmae.runtime.processes import this_process
from fastmae.teachers import Teacher
from fastmae.teachers.precision import AUTOCAST_DTYPES
from fastmae.tokens.codec import parse_codec
from fastmae.tokens.format import LARGEST_SIDE, Part, StoreInfo

SET = "set"
"""The value of `--value-range` that is settled by measuring, too."""
AUTO = "auto"
"""The value of an option that is settled by measuring (`settle`)."""


class Share(NamedTuple):
    """One process among several that fill a store together; each takes every `world_size`-th shard."""

    rank: int
    world_size: int

    @property
    def name(self) -> str:
        """'0-of-2'; '' for the whole store."""
        return f"{self.rank}-of-{self.world_size}" if self.world_size > 1 else ""

    def shards(self, num_shards: int) -> range:
        """The shards of this process, out of all of the store's."""
        return range(self.rank, num_shards, self.world_size)


def check_options(config: TokenizeConfig) -> None:
    """Refuse options that do not go together.

    Raises:
        InputError: names the option.
    """
    teacher_channels(config)
    if config.pixels == "jpeg" and config.channels not in (1, 3):
        raise InputError(f"--channels {config.channels}: a JPEG holds 1 or 3; take --pixels raw")
    if config.codec != AUTO:
        parse_codec(config.codec)
    check_precision(config.precision, resolve_device(config.device))
    if not str(config.store.absolute()).isprintable():
        raise InputError(
            f"{str(config.store)!r}: safetensors and Parquet take no such path; give one in UTF-8 without control "
            "characters"
        )
    if config.images.is_dir() and config.store.resolve().is_relative_to(config.images.resolve()):
        raise InputError(f"{config.store}: lies inside the images' folder; take a place outside {config.images}")


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that a device does not have.

    Raises:
        InputError: names the option.
    """
    if precision == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32: only CUDA GPUs have it; give bf16-mixed or 32-true")
    if precision in AUTOCAST_DTYPES and not torch.amp.is_autocast_available(device.type):
        raise InputError(f"--precision {precision}: not available on {device}; give 32-true")


def middle_sizes(config: TokenizeConfig) -> list[int]:
    """`--middle-size` as numbers of pixels, smallest first.

    Raises:
        InputError: no whole numbers, or a size that is no multiple of the patch size.
    """
    sizes = sorted({*numbers(Annotated[int, PIXELS], config.middle_size, "--middle-size")})
    patch_size = config.patch_size
    for size in sizes:
        if size > LARGEST_SIDE:
            raise InputError(f"--middle-size {size}: give {LARGEST_SIDE} pixels at most")
        if size < patch_size or size % patch_size:
            nearest = max(1, round(size / patch_size)) * patch_size
            raise InputError(f"--middle-size {size}: not a multiple of --patch-size {patch_size}; take {nearest}")
    return sizes


def teacher_channels(config: TokenizeConfig) -> tuple[int, ...]:
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


def process_share(config: TokenizeConfig) -> Share:
    """This process's share: from the flags, or from torchrun or srun.

    Raises:
        InputError: one flag without the other, or a rank that does not exist.
    """
    rank, world_size = config.rank, config.world_size
    if rank is None and world_size is None:
        return Share(this_process().rank, this_process().world_size)
    if rank is None or world_size is None:
        raise InputError("--rank and --world-size go together; give both or neither")
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank}: give 0 to {world_size - 1} for --world-size {world_size}")
    return Share(rank, world_size)


def build_teacher(config: TokenizeConfig, middle_size: int, network: Any, weights_file: str | None) -> Teacher:
    """The teacher for one middle size, on its device.

    Args:
        config: the command's options.
        middle_size: side of the middle image, in pixels.
        network: from `load_network`; changed by this call.
        weights_file: from `load_network`.
    """
    teacher = Teacher(
        config.teacher,
        network,
        middle_size,
        middle_size // config.patch_size,
        block=config.teacher_block,
        norm=config.teacher_norm,
        input_size=config.teacher_size,
        last=config.teacher_last,
        weights_file=weights_file,
        channels=teacher_channels(config),
    )
    return teacher.to(own_device(config.device))


def describe_store(config: TokenizeConfig, middle_size: int, teacher: Teacher, part: Part) -> StoreInfo:
    """The description of a new store of one middle size. What is to be measured is still 'auto' or 'set'."""
    value_range = config.value_range if isinstance(config.value_range, str) else text_of(*config.value_range)
    return StoreInfo(
        teacher=teacher.describe(),
        token_dim=teacher.token_dim,
        middle_size=middle_size,
        patch_size=config.patch_size,
        channels=config.channels,
        resize=config.resize,
        codec=config.codec,
        flips=config.flips,
        pixels=config.pixels,
        jpeg_quality=config.jpeg_quality if config.pixels == "jpeg" else 0,
        shard_size=config.shard_size,
        parts=(part,),
        value_range=value_range,
    )
