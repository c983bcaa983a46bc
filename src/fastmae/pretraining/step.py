"""What one step of pre-training is made of: its Fabric, its batches, its optimizer, its scalars; and how fast it is here."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.data import DataLoader

from fastmae.config import PretrainConfig
from fastmae.images.views import ViewDraws, normalise
from fastmae.pretraining.plan import Plan, loss_weights, plan
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch, scales_gradients
from fastmae.runtime.workers import guarded, heed_only_the_parent, worker_count
from fastmae.student.encoder import visible_patches
from fastmae.student.loss import StudentLoss
from fastmae.student.student import build_student
from fastmae.student.targets import OnlineTokens
from fastmae.tokens.files import PREFETCH_AT_MOST
from fastmae.tokens.format import shard_name
from fastmae.tokens.loader import StoreViews, ViewBatch, as_read
from fastmae.training.optimiser import adamw
from fastmae.training.sampler import ShuffleOrder, StepSampler

PREFETCH_EVERY = 16
"""Steps between two looks at which shards come next."""
SHARDED_BLOCKS = (Block, EvaBlock)
"""What FSDP shards one by one."""


def launch_for(config: PretrainConfig) -> Fabric:
    """Fabric as the options ask for it."""
    return launch(config.device, config.precision, config.devices, config.seed, config.strategy, SHARDED_BLOCKS)


def optimizer_for(config: PretrainConfig, student: nn.Module, fabric: Fabric) -> torch.optim.AdamW:
    """The optimizer of a run, its rate by the batch size."""
    lr = config.base_lr * config.batch_size / 256
    return adamw(student, lr, config.weight_decay, config.betas, fused=not scales_gradients(fabric))


def view_loader(
    config: PretrainConfig, made: Plan, start_step: int, fabric: Fabric, parts: int = 1, move: bool = True
) -> Iterable[ViewBatch]:
    """Batches of this process from a step on, moved to its device; without `move`, where the loader has them (for a GPU: pinned)."""
    size = config.image_size // made.patch_size
    draws = ViewDraws(size, config.flip, config.mask, visible_patches(size**2, config.mask_ratio), config.seed)
    for store in itertools.chain(*made.stores):
        store.shards.most_mapped = (
            2 * made.shuffle_window or store.shards.most_mapped
        )  # what the cache has given up, a map would hold on to
    order = ShuffleOrder(made.stores[0][0].shard_sizes, config.seed, made.shuffle_window)
    views = StoreViews(made.stores, draws, made.target.reads_tokens, made.target.reads_middle, config.on_damage)
    sampler = StepSampler(
        len(made.stores[0][0]),
        config.batch_size,
        made.steps,
        config.seed,
        start_step,
        fabric.global_rank,
        fabric.world_size,
        parts,
        order,
    )
    workers = min(worker_count(config.workers), max(1, len(sampler)))
    loader = DataLoader(
        views, batch_sampler=sampler, num_workers=workers, collate_fn=as_read,
        pin_memory=fabric.device.type == "cuda", worker_init_fn=heed_only_the_parent,
    )  # fmt: skip
    batches: Iterable[ViewBatch] = guarded(loader)
    if move:
        batches = (batch.to(fabric.device) for batch in batches)
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


def step_function(
    config: PretrainConfig, made: Plan, device: torch.device
) -> Callable[[nn.Module, ViewBatch], Mapping[str, torch.Tensor]]:
    """A pre-training step's scalars, for `fit`."""
    target = made.target
    loss = StudentLoss(config.loss, config.all_layers_weight, target.dims, loss_weights(config, len(target.dims)))
    mean, std = made.stores[0][-1].normalisation
    if isinstance(target, OnlineTokens):
        target.to(device)

    def step(model: nn.Module, batch: ViewBatch) -> Mapping[str, torch.Tensor]:
        images = normalise(batch.pixels, mean, std)
        return loss(model(images, batch.ids_shuffle), target(batch, images), batch.ids_shuffle)

    return step


def speed(config: PretrainConfig, timed_steps: int) -> float:
    """Views a second of a run on this machine, measured over a few steps of a student that is thrown away."""
    made, fabric = plan(config), launch_for(config)
    student = build_student(config, made.patch_size, made.target_dim, made.channels)
    model = fabric.setup_module(student)
    optimizer: Any = fabric.setup_optimizers(optimizer_for(config, student, fabric))
    step, begun = step_function(config, made, fabric.device), 0.0
    for number, batch in enumerate(itertools.islice(view_loader(config, made, 0, fabric), timed_steps + 2)):
        if number == 2:  # the first steps also allocate
            begun = time.monotonic()
        fabric.backward(step(model, batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return config.batch_size * timed_steps / (time.monotonic() - begun)
