"""The plan of a pre-training run: what follows from its options and stores, before a device or a weight is touched."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastmae.config import PretrainConfig
from fastmae.config.ranges import Range
from fastmae.config.resolve import numbers
from fastmae.config.teacher import names_code
from fastmae.errors import InputError
from fastmae.runs.folder import RUN_FILE, read_run
from fastmae.runtime.batch_memory import check_batch
from fastmae.student.normalisation import Normalisation, StoreNorm, channel_norm, patch_norm, unchanged
from fastmae.student.student import build_student
from fastmae.student.targets import Hog, NormPix, OnlineTokens, StoredTokens, Target
from fastmae.teachers.factory import teacher_of_store
from fastmae.tokens import TokenStore
from fastmae.tokens.files import is_url
from fastmae.tokens.reader import open_scales, pooled_statistics
from fastmae.training.run import images_at_once
from fastmae.training.task import Settings

STORE_WEIGHT = Range(gt=0, le=1_000_000)


@dataclass(frozen=True)
class Plan:
    """What follows from the options and the stores.

    Attributes:
        stores: for each teacher, its store at each middle size, smallest first.
        norms: guidance normalisation of each store; one entry for a target that reads no teacher's features.
        losses: kind of loss for each teacher's part of the target.
        target: what is predicted; not yet on a device.
        loss_weights: weight of each teacher's loss.
        settings: size of the run.
        shuffle_window: shards within which an epoch shuffles its images; 0: all.
    """

    stores: list[list[TokenStore]]
    norms: list[str]
    losses: tuple[str, ...]
    target: Target
    loss_weights: tuple[float, ...]
    settings: Settings
    shuffle_window: int

    @property
    def target_dim(self) -> int:
        """Channels of the whole target, C."""
        return sum(self.target.dims)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.stores[0][0].info.patch_size

    @property
    def channels(self) -> int:
        """Channels of the images, K."""
        return self.stores[0][0].info.channels


def make_plan(config: PretrainConfig) -> Plan:
    """Open the stores and check that they fit the options and each other.

    Raises:
        InputError: options or stores that don't fit together.
    """
    stores = open_stores(config)
    info = stores[0][0].info  # of the smallest middle size
    if config.image_size > info.middle_size:
        raise InputError(
            f"--image-size {config.image_size}: larger than the middle images of {stores[0][0].location}, which have "
            f"{info.middle_size} px; give {info.middle_size} or less, or a recipe for small images"
        )
    check_batch(images_at_once(config, config.batch_size), info.channels, config.image_size)
    norms = [resolve_norm(config, scales) for scales in stores]
    target = make_target(config, stores, norms)
    build_student(config, info.patch_size, sum(target.dims), info.channels, on="meta")  # raises if sizes don't fit
    return Plan(
        stores,
        norms,
        tuple(resolve_loss(config, scales[0].info.teacher["kind"]) for scales in stores[: len(target.dims)]),
        target,
        loss_weights(config, len(target.dims)),
        _settings(config, len(stores[0][0])),
        _shuffle_window(config, stores),
    )


def open_stores(config: PretrainConfig) -> list[list[TokenStore]]:
    """The stores, each at its middle sizes. All must hold the same images at the same sizes.

    Raises:
        InputError: no store, or two that differ.
    """
    if not config.stores:
        raise InputError("give a token store and a folder for the run: fastmae pretrain STORE... RUN")
    cache, cache_bytes = config.cache.expanduser(), int(config.cache_size * 1e9)
    stores = [open_scales(location, cache, cache_bytes) for location in config.stores]
    for other in stores[1:]:
        if len(other) != len(stores[0]):
            raise InputError(
                f"{config.stores[0]} holds {len(stores[0])} middle sizes, another store {len(other)}; "
                "tokenize both with the same --middle-size"
            )
        for first_scale, other_scale in zip(stores[0], other, strict=True):
            _check_alike(first_scale, other_scale)
    return stores


def _check_alike(first: TokenStore, other: TokenStore) -> None:
    for name in ("images_sha256", "middle_size", "patch_size", "channels", "resize", "value_range", "flips"):
        expected, actual = getattr(first.info, name), getattr(other.info, name)
        if actual != expected:
            difference = "other images" if name == "images_sha256" else f"{name} {actual}, not {expected},"
            raise InputError(
                f"{other.location}: has {difference} than {first.location}; "
                "tokenize the same folder with the same settings"
            )
    if not first.holds_the_images_of(other):
        raise InputError(
            f"{other.location}: skipped other images than {first.location}; tokenize both again from the same folder"
        )


def resolve_norm(config: PretrainConfig, scales: Sequence[TokenStore]) -> str:
    """`--norm auto`: the paper's patch norm, except for a CNN's map, where it would remove the mean of the image."""
    if config.norm != "auto":
        return config.norm
    if config.target in ("pixels", "hog"):
        return "none"
    return "patch" if scales[0].info.teacher["kind"] == "vit" else "store"


def resolve_loss(config: PretrainConfig, teacher_kind: str) -> str:
    """`--loss auto`: smooth L1, except for a CNN's map, from which a small student learns more by the cosine."""
    if config.loss != "auto":
        return config.loss
    if config.target in ("pixels", "hog"):
        return "mse"
    return "smooth-l1" if teacher_kind == "vit" else "cosine"


def make_target(config: PretrainConfig, stores: list[list[TokenStore]], norms: list[str]) -> Target:
    """What is predicted (g of Eq. 1)."""
    info = stores[0][0].info
    patch_size, view_grid = info.patch_size, config.image_size // info.patch_size
    if config.target == "pixels":
        return NormPix(patch_size, info.channels)
    if config.target == "hog":
        return hog_target(config, patch_size, info.channels)
    check_middle_sizes(config.target, len(stores[0]))
    normalisations = [_normalisation(norm, scales) for norm, scales in zip(norms, stores, strict=True)]
    if config.target == "tokens":
        return StoredTokens([scales[0].codec for scales in stores], normalisations)
    teachers = [
        teacher_of_store(
            scales[0].info.teacher, info.middle_size, scales[0].grid, scales[0].folder, _given_teacher(config, scales)
        )
        for scales in stores
    ]
    return OnlineTokens(teachers, normalisations, view_grid, exact_flips=info.flips == "stored")


def _given_teacher(config: PretrainConfig, scales: Sequence[TokenStore]) -> str | None:
    """`--teacher`, for a store that takes it: the only one, or one whose teacher is code."""
    takes_it = len(config.stores) == 1 or names_code(scales[0].info.teacher["spec"])
    return config.teacher if takes_it else None


def check_middle_sizes(target: str, sizes: int) -> None:
    """Raise an InputError if a target can't be made from stores of so many middle sizes."""
    if target == "teacher" and sizes > 1:
        raise InputError("--target teacher: needs a store of one middle size, so that a batch fits into one tensor")


def hog_target(config: PretrainConfig, patch_size: int, channels: int) -> Hog:
    """`--target hog`, which needs no store.

    Raises:
        InputError: patches or a normalisation that HOG can't have.
    """
    return Hog(patch_size, _normalisation("none" if config.norm == "auto" else config.norm, []), channels)


def _normalisation(norm: str, scales: Sequence[TokenStore]) -> Normalisation:
    if norm == "store":
        if not scales:
            raise InputError("--norm store: needs a teacher's features; use patch, channel or none")
        statistics = pooled_statistics(scales)
        return StoreNorm(statistics["mean"], statistics["std"])
    return {"patch": patch_norm, "channel": channel_norm, "none": unchanged}[norm]


def loss_weights(config: PretrainConfig, teachers: int) -> tuple[float, ...]:
    """`--store-weights`, one number per teacher.

    Raises:
        InputError: no positive numbers, or too few or many.
    """
    if not config.store_weights:
        return (1.0,) * teachers
    weights = numbers(Annotated[float, STORE_WEIGHT], config.store_weights, "--store-weights")
    if len(weights) != teachers:
        raise InputError(f"--store-weights {config.store_weights}: give one number for each of the {teachers} stores")
    return weights


def _settings(config: PretrainConfig, images: int) -> Settings:
    return Settings(
        images,
        config.epochs,
        config.batch_size,
        config.lr,
        config.warmup_epochs,
        config.knn_every or math.inf,
    )


def _shuffle_window(config: PretrainConfig, stores: list[list[TokenStore]]) -> int:
    """`--shuffle-window`. Default: that of the run that is continued; else 0 if the stores fit into memory or the
    cache."""
    if config.shuffle_window is not None:
        return config.shuffle_window
    if config.resume and (config.run / RUN_FILE).exists():
        return int(read_run(config.run).get("options", {}).get("shuffle_window", 0))
    total_bytes = sum(store.manifest.total_bytes() for scales in stores for store in scales)
    remote = any(is_url(location) for location in config.stores)
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    room = config.cache_size * 1e9 if remote else memory
    if total_bytes <= (0.9 if remote else 0.5) * room:
        return 0
    return max(1, int(stores[0][0].info.shards * room / 4 / total_bytes))
