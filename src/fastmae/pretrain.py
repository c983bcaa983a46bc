"""`fastmae pretrain`: a token store in, a run with a trained encoder out (Sec. 3.2.4, Fig. 3b)."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
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
from fastmae.encoders import initialise_student
from fastmae.errors import InputError
from fastmae.images.views import ViewDraws, normalise
from fastmae.loading import guarded, heed_only_the_parent, worker_count
from fastmae.model import Student, StudentLoss, visible_patches
from fastmae.plan import Plan, loss_weights, plan
from fastmae.runs import build_student
from fastmae.targets import OnlineTokens
from fastmae.tokens.files import PREFETCH_AT_MOST
from fastmae.tokens.format import shard_name
from fastmae.tokens.loader import StoreViews, ViewBatch, as_read
from fastmae.training.engine import launch, on_first_process, scales_gradients
from fastmae.training.loop import TrainState, fit, micro_batches
from fastmae.training.optimiser import adamw, cosine_schedule
from fastmae.training.run_folder import RunFolder, read_metrics
from fastmae.training.sampler import ShuffleOrder, StepSampler

NOT_OF_THE_RUN = (
    "stores", "run", "config", "print_config", "json", "resume", "device", "devices", "strategy", "workers", "save_every", "recipe",
    "micro_batch", "compile", "checkpoint_activations", "on_damage", "cache", "cache_size",
)  # fmt: skip
"""Options that may change when a run is continued: they change where and how fast it trains, not what."""
PREFETCH_EVERY = 16
"""Steps between two looks at which shards come next."""
SHARDED_BLOCKS = (Block, EvaBlock)
"""What FSDP shards one by one."""


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
    begun_with = initialise_student(student, config.init) if config.init and not folder.checkpoint.exists() else ""
    ema = ModelEmaV3(student, config.ema, use_warmup=True, device=fabric.device) if config.ema else None
    model = fabric.setup_module(cast(nn.Module, torch.compile(student)) if config.compile else student)
    optimizer = _optimizer(config, student, fabric)
    warmup = min(round(config.warmup_epochs * images / config.batch_size), steps // 2)
    schedule = cosine_schedule(optimizer, steps, warmup, config.min_lr)
    state = TrainState(student, model, fabric.setup_optimizers(optimizer), description, ema)
    state.restore(fabric, folder)
    if fabric.is_global_zero:
        _announce(config, made, student, parts, state.step, fabric)
        if begun_with:
            print(f"begins with {begun_with}")
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
    for store in itertools.chain(*made.stores):
        store.most_mapped = 2 * made.shuffle_window or store.most_mapped  # what the cache has given up, a map would hold on to
    order = ShuffleOrder(made.stores[0][0].shard_sizes, config.seed, made.shuffle_window)
    views = StoreViews(made.stores, draws, made.target.reads_tokens, made.target.reads_middle, config.on_damage)
    sampler = StepSampler(
        len(made.stores[0][0]), config.batch_size, made.steps, config.seed, start_step, fabric.global_rank, fabric.world_size, parts, order
    )
    workers = min(worker_count(config.workers), max(1, len(sampler)))
    loader = DataLoader(
        views, batch_sampler=sampler, num_workers=workers, collate_fn=as_read,
        pin_memory=fabric.device.type == "cuda", worker_init_fn=heed_only_the_parent,
    )  # fmt: skip
    batches = (batch.map(lambda tensor: tensor.to(fabric.device, non_blocking=True)) for batch in guarded(loader))
    return _prefetching(batches, config, made, sampler, start_step, parts)


def _prefetching(
    batches: Iterable[ViewBatch], config: PretrainConfig, made: Plan, sampler: StepSampler, start_step: int, parts: int
) -> Iterator[ViewBatch]:
    """The same batches; on the way, the shards that come next are fetched from where the stores are."""
    ahead = min(2 * made.shuffle_window or PREFETCH_AT_MOST, PREFETCH_AT_MOST)
    for number, batch in enumerate(batches):
        if number % (PREFETCH_EVERY * parts) == 0:
            names = [shard_name(shard) for shard in sampler.shards_ahead(start_step + number // parts, ahead)]
            for store in itertools.chain(*made.stores):
                if store.info.shard_size == made.stores[0][0].info.shard_size:  # else its shards hold other images
                    store.files.prefetch(names)
        yield batch


def step_function(config: PretrainConfig, made: Plan, device: torch.device) -> Callable[[nn.Module, ViewBatch], Mapping[str, torch.Tensor]]:
    """A pre-training step's scalars, for `fit`."""
    target = made.target
    loss = StudentLoss(config.loss, config.all_layers_weight, target.dims, loss_weights(config, len(target.dims)))
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
        "options": {**options, "norm": made.norms[0] if len(set(made.norms)) == 1 else "auto", "shuffle_window": made.shuffle_window},
        "target_dims": list(made.target.dims),
        "store": {
            "images": len(scales[0]),
            "images_sha256": info.images_sha256,
            "middle_sizes": [store.info.middle_size for store in scales],
            "patch_size": info.patch_size,
            "shard_size": info.shard_size if made.shuffle_window else None,
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
