"""What a pre-training run is to be: all that follows from its options and stores alone, before a device or a weight is touched."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.runs.folder import RUN_FILE, read_run
from fastmae.student.student import build_student
from fastmae.student.targets import (
    Hog,
    Normalisation,
    NormPix,
    OnlineTokens,
    StoredTokens,
    Target,
    channel_norm,
    patch_norm,
    store_norm,
    unchanged,
)
from fastmae.teachers.factory import teacher_of_store
from fastmae.tokens import TokenStore
from fastmae.tokens.files import is_url
from fastmae.tokens.reader import open_scales, pooled_statistics


@dataclass(frozen=True)
class Plan:
    """What follows from the options and the stores alone, before a device or a weight is touched.

    Attributes:
        stores: of each teacher, its middle sizes.
        norms: resolved, one a store (one for a target without stores' features).
        target: not yet on a device.
        steps: in the whole run.
        shuffle_window: shards within which an epoch shuffles its images; 0: among all.
    """

    stores: list[list[TokenStore]]
    norms: list[str]
    target: Target
    steps: int
    shuffle_window: int

    @property
    def target_dim(self) -> int:
        """Channels of the whole target."""
        return sum(self.target.dims)

    @property
    def patch_size(self) -> int:
        """In pixels."""
        return self.stores[0][0].info.patch_size

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.stores[0][0].info.channels


def plan(config: PretrainConfig) -> Plan:
    """Check the options and open the stores.

    Raises:
        InputError: options or stores that don't fit together.
    """
    _check(config)
    stores = open_stores(config)
    info = stores[0][0].info  # of the smallest size
    if config.image_size > info.middle_size:
        raise InputError(
            f"--image-size {config.image_size}: larger than {stores[0][0].folder}'s middle images of {info.middle_size} px"
        )
    norms = [resolve_norm(config, store) for store in stores]
    target = make_target(config, stores, norms)
    build_student(
        config, info.patch_size, sum(target.dims), info.channels, on="meta"
    )  # sizes that don't fit fail before anything is made
    if len(loss_weights(config, len(target.dims))) != len(target.dims):
        raise InputError(
            f"--store-weights {config.store_weights}: give one number for each of the {len(stores)} stores"
        )
    steps = max(1, math.ceil(config.epochs * len(stores[0][0]) / config.batch_size))
    return Plan(stores, norms, target, steps, _shuffle_window(config, stores))


def open_stores(config: PretrainConfig) -> list[list[TokenStore]]:
    """The stores, each with its middle sizes; all must hold the same images at the same sizes.

    Raises:
        InputError: none given, or what differs between two.
    """
    if not config.stores:
        raise InputError("give a token store and a folder for the run: fastmae pretrain STORE... RUN")
    stores = [
        open_scales(location, config.cache.expanduser(), int(config.cache_size * 1e9)) for location in config.stores
    ]
    for other in stores[1:]:
        if len(other) != len(stores[0]):
            raise InputError(
                f"{config.stores[0]} holds {len(stores[0])} middle sizes, another store {len(other)}; tokenize both alike"
            )
        for mine, theirs in zip(stores[0], other, strict=True):
            _check_alike(mine, theirs)
    return stores


def _check_alike(first: TokenStore, other: TokenStore) -> None:
    for name in ("images_sha256", "middle_size", "patch_size", "channels", "resize", "flips"):
        mine, theirs = getattr(first.info, name), getattr(other.info, name)
        if mine != theirs:
            what = "other images" if name == "images_sha256" else f"{name} {theirs}, not {mine},"
            raise InputError(
                f"{other.folder}: has {what} than {first.folder}; tokenize the same folder with the same settings"
            )
    if not first.holds_the_images_of(other):
        raise InputError(
            f"{other.folder}: skipped other images than {first.folder}; tokenize both again from the same folder"
        )


def resolve_norm(config: PretrainConfig, stores: Sequence[TokenStore]) -> str:
    """`--norm auto`: patch norm as in the paper, but for a CNN's map, where it would take out the image's own mean."""
    if config.norm != "auto":
        return config.norm
    if config.target == "hog":
        return "none"
    return "patch" if stores[0].info.teacher["kind"] == "vit" else "store"


def make_target(config: PretrainConfig, stores: list[list[TokenStore]], norms: list[str]) -> Target:
    """What is predicted."""
    info = stores[0][0].info
    patch, size = info.patch_size, config.image_size // info.patch_size
    if config.target == "pixels":
        return NormPix(patch, info.channels)
    if config.target == "hog":
        return Hog(patch, _normalisation(norms[0], []), info.channels)
    functions = [_normalisation(norm, scales) for norm, scales in zip(norms, stores, strict=True)]
    if config.target == "tokens":
        return StoredTokens([scales[0].codec for scales in stores], functions)
    if len(stores[0]) > 1:
        raise InputError(
            "--target teacher: takes a store of one middle size, since a batch's images go to the teacher together"
        )
    teachers = [teacher_of_store(scales[0].info.teacher, info.middle_size, scales[0].grid) for scales in stores]
    return OnlineTokens(teachers, functions, size, exact_flips=info.flips == "stored")


def _normalisation(name: str, scales: Sequence[TokenStore]) -> Normalisation:
    if name == "store":
        if not scales:
            raise InputError("--norm store: goes with a teacher's features; take patch, channel or none")
        statistics = pooled_statistics(scales)
        return store_norm(statistics["mean"], statistics["std"])
    return {"patch": patch_norm, "channel": channel_norm, "none": unchanged}[name]


def _shuffle_window(config: PretrainConfig, stores: list[list[TokenStore]]) -> int:
    """`--shuffle-window`; by default that of the run that is continued, else all of what fits, or a quarter of what does."""
    if config.shuffle_window is not None:
        return config.shuffle_window
    if config.resume and (config.run / RUN_FILE).exists():
        return int(read_run(config.run).get("options", {}).get("shuffle_window", 0))
    total = sum(store.manifest.total_bytes() for scales in stores for store in scales)
    remote = any(is_url(location) for location in config.stores)
    room = config.cache_size * 1e9 if remote else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if total <= (0.9 if remote else 0.5) * room:
        return 0
    return max(1, int(stores[0][0].info.shards * room / 4 / total))


def loss_weights(config: PretrainConfig, count: int) -> tuple[float, ...]:
    """`--store-weights`, one for each teacher."""
    if not config.store_weights:
        return (1.0,) * count
    try:
        weights = tuple(float(part) for part in config.store_weights.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(
            f"--store-weights {config.store_weights}: give positive numbers with commas between them, as 1,0.5"
        )
    return weights


LEAST_ONE = (
    "encoder_width", "encoder_depth", "encoder_heads", "epochs", "batch_size", "image_size", "decoder_depth", "decoder_width",
    "decoder_heads", "log_every",
)  # fmt: skip
LEAST_ZERO = (
    "warmup_epochs",
    "min_lr",
    "weight_decay",
    "clip_grad",
    "save_every",
    "all_layers_weight",
    "micro_batch",
    "knn_every",
)


def _check(config: PretrainConfig) -> None:
    for least, names in ((1, LEAST_ONE), (0, LEAST_ZERO)):
        for name in names:
            value = getattr(config, name)
            if value is not None and not value >= least:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if not config.base_lr > 0:
        raise InputError(f"--base-lr {config.base_lr}: give more than 0")
    if config.shuffle_window is not None and config.shuffle_window < 0:
        raise InputError(f"--shuffle-window {config.shuffle_window}: give 0 or more shards")
    if not 0 < config.cache_size < math.inf:
        raise InputError(f"--cache-size {config.cache_size}: give more than 0 gigabytes")
    if config.store_weights and config.target in ("pixels", "hog"):
        raise InputError(f"--store-weights: weighs the tokens of several stores; --target {config.target} reads none")
    if config.ema and not 0 < config.ema < 1:
        raise InputError(f"--ema {config.ema}: give more than 0 and less than 1, 0.9999 say")
    if config.strategy == "fsdp" and config.ema:
        raise InputError("--ema: no process has the whole of a sharded student; take --strategy ddp")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise InputError(f"--betas {config.betas[0]} {config.betas[1]}: give two numbers from 0 to below 1")
    if config.decoder_width % config.decoder_heads:
        raise InputError(
            f"--decoder-width {config.decoder_width}: not a multiple of --decoder-heads {config.decoder_heads}"
        )
    if config.target == "pixels" and (config.all_layers or config.norm not in ("none", "auto")):
        raise InputError("--target pixels is MAE's norm-pix loss: it takes --no-all-layers and --norm none")
