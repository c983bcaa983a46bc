"""`fastmae pretrain`: a token store in, a run with a trained encoder out (Sec. 3.2.4, Fig. 3b)."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from fastmae.config import PretrainConfig
from fastmae.device import memory_hint
from fastmae.errors import InputError
from fastmae.images.views import ViewDraws, normalise
from fastmae.loading import guarded, heed_only_the_parent, worker_count
from fastmae.model import Student, StudentLoss, visible_patches
from fastmae.runs import build_student
from fastmae.targets import Hog, Normalisation, NormPix, OnlineTokens, StoredTokens, Target, channel_norm, patch_norm, store_norm, unchanged
from fastmae.teachers.factory import teacher_of_store
from fastmae.tokens import TokenStore
from fastmae.tokens.loader import StoreViews, ViewBatch, collate_views
from fastmae.tokens.reader import open_scales, pooled_statistics
from fastmae.training.engine import launch, on_first_process, scales_gradients
from fastmae.training.loop import TrainState, fit
from fastmae.training.optimiser import adamw, cosine_schedule
from fastmae.training.run_folder import RunFolder, read_metrics
from fastmae.training.sampler import StepSampler

NOT_OF_THE_RUN = (
    "stores", "run", "config", "print_config", "json", "resume", "device", "devices", "strategy", "workers", "save_every", "recipe",
    "micro_batch", "compile", "checkpoint_activations",
)  # fmt: skip
"""Options that may change when a run is continued: they change where and how fast it trains, not what."""
SHARDED_BLOCKS = (Block, EvaBlock)
"""What FSDP shards one by one."""


@dataclass(frozen=True)
class Plan:
    """What follows from the options and the stores alone, before a device or a weight is touched.

    Attributes:
        stores: of each teacher, its middle sizes.
        norms: resolved, one a store (one for a target without stores' features).
        target: not yet on a device.
        steps: in the whole run.
    """

    stores: list[list[TokenStore]]
    norms: list[str]
    target: Target
    steps: int

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
        raise InputError(f"--image-size {config.image_size}: larger than {stores[0][0].folder}'s middle images of {info.middle_size} px")
    norms = [resolve_norm(config, store) for store in stores]
    target = make_target(config, stores, norms)
    build_student(config, info.patch_size, sum(target.dims), info.channels, on="meta")  # sizes that don't fit fail before anything is made
    if len(_weights(config, len(target.dims))) != len(target.dims):
        raise InputError(f"--store-weights {config.store_weights}: give one number for each of the {len(stores)} stores")
    return Plan(stores, norms, target, max(1, math.ceil(config.epochs * len(stores[0][0]) / config.batch_size)))


def pretrain(config: PretrainConfig) -> dict[str, Any] | None:
    """Train a run to its end, or continue it; the command's JSON (None in all processes but the first)."""
    made = plan(config)
    images, steps = len(made.stores[0][0]), made.steps
    fabric = _launch(config)
    if config.batch_size % fabric.world_size:
        raise InputError(f"--batch-size {config.batch_size}: not a multiple of the {fabric.world_size} processes")
    parts = micro_batches(config.batch_size // fabric.world_size, config.micro_batch)
    description = describe(config, made)
    on_first_process(fabric, lambda: RunFolder(config.run, description, config.resume))
    folder = RunFolder(config.run, description, resume=True)

    student = build_student(config, made.patch_size, made.target_dim, made.channels)
    ema = ModelEmaV3(student, config.ema, use_warmup=True, device=fabric.device) if config.ema else None
    model = fabric.setup_module(cast(nn.Module, torch.compile(student)) if config.compile else student)
    optimizer = _optimizer(config, student, fabric)
    warmup = min(round(config.warmup_epochs * images / config.batch_size), steps // 2)
    schedule = cosine_schedule(optimizer, steps, warmup, config.min_lr)
    state = TrainState(student, model, fabric.setup_optimizers(optimizer), description, ema)
    state.restore(fabric, folder)
    if fabric.is_global_zero:
        _announce(config, made, student, parts, state.step, fabric)
    share = config.batch_size // fabric.world_size // parts
    with memory_hint(f"give --micro-batch {max(1, share // 2)} (now {share}), and the same call continues"):
        entry = fit(
            fabric,
            state,
            schedule,
            view_loader(config, made, state.step, fabric, parts),
            step_function(config, made, fabric.device),
            folder,
            what="pretrain",
            steps=steps,
            steps_an_epoch=images / config.batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
            clip_grad=config.clip_grad,
            save_every=config.save_every,
            log_every=config.log_every,
            parts=parts,
        )
    if not fabric.is_global_zero:
        return None
    entry = entry or _last_entry(folder)
    print(f"{config.run}: {steps} steps, loss {entry['loss']:.4f}, {entry['seconds']:.0f} s; next: fastmae knn {config.run} DATA")
    return {
        "epochs": config.epochs,
        "steps": steps,
        "loss": entry["loss"],
        "seconds": entry["seconds"],
        "images_per_second": entry["images_per_second"],
        "checkpoint": str(folder.checkpoint),
    }


def _last_entry(folder: RunFolder) -> dict[str, Any]:
    entries = read_metrics(folder.path)
    if not entries:
        raise InputError(
            f"{folder.path}: the run is finished and its checkpoint whole, but its metrics.jsonl is gone; --no-resume trains again"
        )
    return entries[-1]


def open_stores(config: PretrainConfig) -> list[list[TokenStore]]:
    """The stores, each with its middle sizes; all must hold the same images at the same sizes.

    Raises:
        InputError: none given, or what differs between two.
    """
    if not config.stores:
        raise InputError("give a token store and a folder for the run: fastmae pretrain STORE... RUN")
    stores = [open_scales(path) for path in config.stores]
    for other in stores[1:]:
        if len(other) != len(stores[0]):
            raise InputError(f"{config.stores[0]} holds {len(stores[0])} middle sizes, another store {len(other)}; tokenize both alike")
        for mine, theirs in zip(stores[0], other, strict=True):
            _check_alike(mine, theirs)
    return stores


def _check_alike(first: TokenStore, other: TokenStore) -> None:
    for name in ("images_sha256", "middle_size", "patch_size", "channels", "resize", "flips"):
        mine, theirs = getattr(first.info, name), getattr(other.info, name)
        if mine != theirs:
            what = "other images" if name == "images_sha256" else f"{name} {theirs}, not {mine},"
            raise InputError(f"{other.folder}: has {what} than {first.folder}; tokenize the same folder with the same settings")
    if not first.holds_the_images_of(other):
        raise InputError(f"{other.folder}: skipped other images than {first.folder}; tokenize both again from the same folder")


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
        return StoredTokens([scales[0].token_dim for scales in stores], functions)
    if len(stores[0]) > 1:
        raise InputError("--target teacher: takes a store of one middle size, since a batch's images go to the teacher together")
    teachers = [teacher_of_store(scales[0].info.teacher, info.middle_size, scales[0].grid) for scales in stores]
    return OnlineTokens(teachers, functions, size, exact_flips=info.flips == "stored")


def _normalisation(name: str, scales: Sequence[TokenStore]) -> Normalisation:
    if name == "store":
        if not scales:
            raise InputError("--norm store: goes with a teacher's features; take patch, channel or none")
        statistics = pooled_statistics(scales)
        return store_norm(statistics["mean"], statistics["std"])
    return {"patch": patch_norm, "channel": channel_norm, "none": unchanged}[name]


def micro_batches(share: int, most: int) -> int:
    """Into how many equal parts a device's share of a batch is cut so that none has more than `most` views (0: no limit)."""
    least = -(-share // most) if most else 1
    return next(parts for parts in range(least, share + 1) if share % parts == 0)


def speed(config: PretrainConfig, timed_steps: int) -> float:
    """Views a second of a run on this machine, measured over a few steps of a student that is thrown away."""
    made, fabric = plan(config), _launch(config)
    student = build_student(config, made.patch_size, made.target_dim, made.channels)
    model = fabric.setup_module(student)
    optimizer: Any = fabric.setup_optimizers(_optimizer(config, student, fabric))
    step, begun = step_function(config, made, fabric.device), 0.0
    for number, batch in enumerate(itertools.islice(view_loader(config, made, 0, fabric), timed_steps + 2)):
        if number == 2:  # the first steps also allocate
            begun = time.monotonic()
        fabric.backward(step(model, batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return config.batch_size * timed_steps / (time.monotonic() - begun)


def view_loader(config: PretrainConfig, made: Plan, start_step: int, fabric: Fabric, parts: int = 1) -> Iterable[ViewBatch]:
    """Batches of this process from a step on, moved to its device."""
    size = config.image_size // made.patch_size
    draws = ViewDraws(size, config.flip, config.mask, visible_patches(size**2, config.mask_ratio), config.seed)
    views = StoreViews(made.stores, draws, made.target.reads_tokens, made.target.reads_middle)
    sampler = StepSampler(
        len(made.stores[0][0]), config.batch_size, made.steps, config.seed, start_step, fabric.global_rank, fabric.world_size, parts
    )
    workers = min(worker_count(config.workers), max(1, len(sampler)))
    loader = DataLoader(
        views, batch_sampler=sampler, num_workers=workers, collate_fn=collate_views,
        pin_memory=fabric.device.type == "cuda", worker_init_fn=heed_only_the_parent,
    )  # fmt: skip
    return (batch.map(lambda tensor: tensor.to(fabric.device, non_blocking=True)) for batch in guarded(loader))


def step_function(config: PretrainConfig, made: Plan, device: torch.device) -> Callable[[nn.Module, ViewBatch], Mapping[str, torch.Tensor]]:
    """A pre-training step's scalars, for `fit`."""
    target = made.target
    loss = StudentLoss(config.loss, config.all_layers_weight, target.dims, _weights(config, len(target.dims)))
    mean, std = made.stores[0][-1].normalisation
    if isinstance(target, OnlineTokens):
        target.to(device)

    def step(model: nn.Module, batch: ViewBatch) -> Mapping[str, torch.Tensor]:
        images = normalise(batch.pixels, mean, std)
        return loss(model(images, batch.order), target(batch, images), batch.order)

    return step


def describe(config: PretrainConfig, made: Plan) -> dict[str, Any]:
    """What the run is: all that a resumed call must agree with, and all that is needed to load its encoder."""
    options = {name: value for name, value in asdict(config).items() if name not in NOT_OF_THE_RUN}
    scales = made.stores[0]
    info = scales[-1].info
    return {
        "fastmae run": 1,
        "options": {**options, "norm": made.norms[0] if len(set(made.norms)) == 1 else "auto"},
        "target_dims": list(made.target.dims),
        "store": {
            "images": len(scales[0]),
            "images_sha256": info.images_sha256,
            "middle_sizes": [store.info.middle_size for store in scales],
            "patch_size": info.patch_size,
            "channels": info.channels,
            "codec": info.codec,
            "flips": info.flips,
            "pixels": info.pixels,
            "jpeg_quality": info.jpeg_quality,
            "normalisation": [list(values) for values in scales[-1].normalisation],
            "resize": info.resize,
            "teachers": [stores[-1].info.teacher for stores in made.stores],
        },
    }


def _launch(config: PretrainConfig) -> Fabric:
    return launch(config.device, config.precision, config.devices, config.seed, config.strategy, SHARDED_BLOCKS)


def _optimizer(config: PretrainConfig, student: nn.Module, fabric: Fabric) -> torch.optim.AdamW:
    lr = config.base_lr * config.batch_size / 256
    return adamw(student, lr, config.weight_decay, config.betas, fused=not scales_gradients(fabric))


def _weights(config: PretrainConfig, count: int) -> tuple[float, ...]:
    if not config.store_weights:
        return (1.0,) * count
    try:
        weights = tuple(float(part) for part in config.store_weights.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"--store-weights {config.store_weights}: give positive numbers with commas between them, as 1,0.5")
    return weights


LEAST_ONE = (
    "encoder_width", "encoder_depth", "encoder_heads", "epochs", "batch_size", "image_size", "decoder_depth", "decoder_width",
    "decoder_heads", "log_every",
)  # fmt: skip
LEAST_ZERO = ("warmup_epochs", "min_lr", "weight_decay", "clip_grad", "save_every", "all_layers_weight", "micro_batch")


def _check(config: PretrainConfig) -> None:
    for least, names in ((1, LEAST_ONE), (0, LEAST_ZERO)):
        for name in names:
            value = getattr(config, name)
            if value is not None and not value >= least:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if not config.base_lr > 0:
        raise InputError(f"--base-lr {config.base_lr}: give more than 0")
    if config.store_weights and config.target in ("pixels", "hog"):
        raise InputError(f"--store-weights: weighs the tokens of several stores; --target {config.target} reads none")
    if config.ema and not 0 < config.ema < 1:
        raise InputError(f"--ema {config.ema}: give more than 0 and less than 1, 0.9999 say")
    if config.ema and config.strategy == "fsdp":
        raise InputError("--ema: a sharded student has no moving average; take --strategy ddp")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise InputError(f"--betas {config.betas[0]} {config.betas[1]}: give two numbers from 0 to below 1")
    if config.decoder_width % config.decoder_heads:
        raise InputError(f"--decoder-width {config.decoder_width}: not a multiple of --decoder-heads {config.decoder_heads}")
    if config.target == "pixels" and (config.all_layers or config.norm not in ("none", "auto")):
        raise InputError("--target pixels is MAE's norm-pix loss: it takes --no-all-layers and --norm none")


def _announce(config: PretrainConfig, made: Plan, student: Student, parts: int, done: int, fabric: Fabric) -> None:
    millions = sum(p.numel() for p in student.encoder.parameters()) / 1e6
    from_step = f", from step {done}" if done else ""
    in_parts = f" in {parts} parts" if parts > 1 else ""
    what = f"{config.target}, norm {', '.join(made.norms)}" if config.target != "pixels" else "pixels"
    print(
        f"{config.encoder} ({millions:.1f} M) at {config.image_size} px, patch {made.patch_size}: "
        f"{student.visible} of {student.patches} patches visible; target {what}; "
        f"{len(made.stores[0][0])} images, {config.epochs} epochs = {made.steps} steps of {config.batch_size}{in_parts}{from_step}; "
        f"lr {config.base_lr * config.batch_size / 256:.2e}; {fabric.world_size} x {fabric.device.type}"
    )
