"""One step of pre-training, assembled here for `pretrain`, `--profile` and the benches (Sec. 3.2.4, Fig. 3b)."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from fastmae.config import PretrainConfig
from fastmae.images.views import PixelScale, ViewDraws
from fastmae.pretraining.plan import Plan
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.low_precision import no_autocast
from fastmae.student.encoder import visible_patches
from fastmae.student.loss import StudentLoss
from fastmae.student.targets import Target
from fastmae.tokens import TokenStore
from fastmae.tokens.files import PREFETCH_AT_MOST
from fastmae.tokens.format import shard_name
from fastmae.tokens.loader import StoreViews, ViewBatch
from fastmae.training.sampler import StepSampler

PREFETCH_EVERY = 16
"""Steps between two looks at which shards come next."""


class PretrainStep:
    """Normalise the views, run the student, make the target, compare the two.

    Args:
        target: what is predicted, g of Eq. 1.
        loss: compares prediction and target.
        mean: mean of the student's input, one value per channel (of values in [0, 1]).
        std: its standard deviation.
        autocast: precision of an online teacher that has none of its own; by default fp32, in which target and loss
            are computed too.

    Attributes:
        pixel_scale: normalises the student's input.
    """

    def __init__(
        self,
        target: Target,
        loss: StudentLoss,
        mean: Sequence[float],
        std: Sequence[float],
        autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ):
        self.target, self.loss, self.autocast = target, loss, autocast
        self.pixel_scale = PixelScale(mean, std)

    def __call__(self, model: nn.Module, batch: ViewBatch) -> Mapping[str, torch.Tensor]:
        """The loss of a batch on the device, and its terms: see `StudentLoss`."""
        prediction = model(batch.pixels, batch.ids_shuffle, self.pixel_scale)
        with no_autocast(batch.pixels):
            return self.loss(prediction, self.targets(batch))

    def targets(self, batch: ViewBatch) -> torch.Tensor:
        """The normalised guidance of all patches in the order of `ids_shuffle`: float32 [B, N, C]."""
        with self.autocast() if self.target.reads_middle else contextlib.nullcontext():
            return self.target(batch, self.pixel_scale)

    def to(self, fabric: Fabric) -> None:
        """Move all that the step computes with, besides the model, to the run's device."""
        self.pixel_scale.to(fabric.device)
        self.target.to(fabric.device)


def step_of(config: PretrainConfig, plan: Plan) -> PretrainStep:
    """The step that the options and the stores ask for."""
    target = plan.target
    loss = StudentLoss(plan.losses, config.all_layers_weight, target.dims, plan.loss_weights, config.relation_weight)
    return PretrainStep(target, loss, *plan.stores[0][-1].normalisation)


def views_of(config: PretrainConfig, plan: Plan) -> StoreViews:
    """The data set: `views[epoch, index]` is a random aligned view of an image."""
    size = config.image_size // plan.patch_size
    draws = ViewDraws(size, config.flip, config.mask, visible_patches(size**2, config.mask_ratio), config.seed)
    for store in all_stores(plan):  # a mapped file takes disk space even after the cache has deleted it
        store.shards.most_mapped = 2 * plan.shuffle_window or store.shards.most_mapped
    return StoreViews(plan.stores, draws, plan.target.reads_tokens, plan.target.reads_middle, config.on_damage)


def prefetching(plan: Plan) -> Callable[[Iterable[ViewBatch], StepSampler], Iterator[ViewBatch]]:
    """Passes batches on; every `PREFETCH_EVERY` steps it starts to fetch the shards that remote stores will need
    next."""
    shards_ahead = min(2 * plan.shuffle_window or PREFETCH_AT_MOST, PREFETCH_AT_MOST)
    # A store with another shard size holds other images in a shard of the same number.
    stores = [store for store in all_stores(plan) if store.info.shard_size == plan.stores[0][0].info.shard_size]

    def pass_on(batches: Iterable[ViewBatch], sampler: StepSampler) -> Iterator[ViewBatch]:
        for number, batch in enumerate(batches):
            steps, micro_batch = divmod(number, sampler.grad_accum_steps)
            if micro_batch == 0 and steps % PREFETCH_EVERY == 0:
                shards = sampler.shards_ahead(sampler.start_step + steps, shards_ahead)
                for store in stores:
                    store.files.prefetch([shard_name(shard) for shard in shards])
            yield batch

    return pass_on


def all_stores(plan: Plan) -> list[TokenStore]:
    """The stores of all teachers and middle sizes."""
    return list(itertools.chain(*plan.stores))
