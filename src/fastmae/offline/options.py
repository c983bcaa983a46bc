"""What the options of `tokenize` mean together: sizes and channels out of their strings, combinations that are refused,
this process's share of the shards, and the teacher and store description that follow from the options."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmae.config import TokenizeConfig
from fastmae.config.tokenize import teacher_channels
from fastmae.errors import InputError
from fastmae.images.value_range import text_of
from fastmae.runtime.device import own_device, resolve_device
from fastmae.runtime.processes import this_process
from fastmae.teachers import Teacher
from fastmae.teachers.precision import AUTOCAST_DTYPES
from fastmae.tokens.files import url_of
from fastmae.tokens.format import Part, StoreInfo

SET = "set"
"""The value of `--value-range` that is settled by measuring, too."""


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
    if url := url_of(config.store):
        name = Path(url).name
        call = f"fastmae tokenize {config.images} {name} --to {url}"
        raise InputError(f"{url}: a URL; a store is written on this machine, then copied: `{call}`")
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


def process_share(config: TokenizeConfig) -> Share:
    """This process's share: from the flags, or from torchrun or srun."""
    rank, world_size = config.rank, config.world_size
    if rank is None and world_size is None:
        return Share(this_process().rank, this_process().world_size)
    assert rank is not None and world_size is not None  # checked: both or neither
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
