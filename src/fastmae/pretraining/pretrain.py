"""`fastmae pretrain`: a token store in, a run with a trained encoder out (Sec. 3.2.4, Fig. 3b)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import nn

from fastmae.config import PretrainConfig
from fastmae.images.value_range import range_entry
from fastmae.pretraining.knn_every import StudentKnn
from fastmae.pretraining.plan import Plan, make_plan
from fastmae.pretraining.profile import profile
from fastmae.pretraining.step import prefetching, step_of, views_of
from fastmae.runs.encoder import initialise_student
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.seeding import seed_everything
from fastmae.runtime.wording import counted, tells_top5
from fastmae.runtime.workers import as_is
from fastmae.student.student import AnyStudent, build_student
from fastmae.tokens.files import is_url
from fastmae.training.driver import train
from fastmae.training.optimiser import muon, muon_groups
from fastmae.training.sampler import ShuffleOrder
from fastmae.training.task import Evaluated, Task, no_initialisation

log = logging.getLogger(__name__)
SHARDED_BLOCKS = (Block, EvaBlock)
"""Modules that FSDP shards one by one."""
Measure = Callable[[AnyStudent], Mapping[str, float]]


def pretrain_command(config: PretrainConfig) -> dict[str, Any] | None:
    """`pretrain`, and a hint at what comes next. Commands that pre-train on the way don't give it."""
    result = pretrain(config)
    if result is not None and not config.profile:
        log.info(f"next: fastmae knn {config.run} DATA")
    return result


def pretrain(config: PretrainConfig, measure: Measure | None = None) -> dict[str, Any] | None:
    """Train a run to its end, or continue it; the command's JSON (None in all processes but the first).

    Args:
        config: the options.
        measure: figures of a student, taken every `knn_every` epochs; None: its k-NN accuracy.
    """
    plan = make_plan(config)
    if config.profile:
        return profile(config, plan, pretraining_task(replace(config, knn_every=0.0), plan))
    config = as_planned(config, plan)
    result = train(config, pretraining_task(config, plan, measure), plan.settings)
    if result is not None:
        log.info(
            f"{config.run}: {counted(result['steps'], 'step')}, loss {result['loss']:.4f}, {result['seconds']:.0f} s"
        )
    return result


def as_planned(config: PretrainConfig, plan: Plan) -> PretrainConfig:
    """The options with what the plan has made of `--norm auto`, `--loss auto` and the default `--shuffle-window`."""
    planned: dict[str, Any] = {"shuffle_window": plan.shuffle_window}
    for option, kinds in (("norm", plan.norms), ("loss", plan.losses)):
        planned[option] = kinds[0] if len(set(kinds)) == 1 else "auto"
    return replace(config, **planned)


def pretraining_task(config: PretrainConfig, plan: Plan, measure: Measure | None = None) -> Task:
    """The task for the training driver. Arguments as `pretrain`'s."""
    seed_everything(config.seed)
    student = build_student(config, plan.patch_size, plan.target_dim, plan.channels)
    step = step_of(config, plan)
    evaluate = _evaluation(config, plan, measure) if config.knn_every else None
    few_classes = isinstance(evaluate, StudentKnn) and not tells_top5(evaluate.images.classes)
    return Task(
        name="pretrain",
        out=config.run,
        headline=_headline(config, plan, student),
        network=student,
        dataset=views_of(config, plan),
        step=step,
        parameter_groups=lambda: _parameter_groups(config, student),
        optimizer=partial(muon, betas=config.betas) if config.optimizer == "muon" else None,
        description=describe(config, plan),
        inputs={"stores": [_absolute(store) for store in config.stores]},
        evaluate=evaluate,
        shown=("knn_top1",) if few_classes else (),
        collate=as_is,
        order=ShuffleOrder(plan.stores[0][0].shard_sizes, config.seed, plan.shuffle_window),
        wrap_batches=prefetching(plan),
        initialise=partial(initialise_student, spec=config.init) if config.init else no_initialisation,
        to_device=step.to,
        compile=config.compile,
        step_in_forward=True,
        strategy=config.strategy,
        sharded_blocks=SHARDED_BLOCKS,
        lr_flag="--base-lr",
    )


def _parameter_groups(config: PretrainConfig, student: nn.Module) -> list[dict[str, Any]]:
    groups = muon_groups if config.optimizer == "muon" else param_groups_weight_decay
    return groups(student, config.weight_decay)


def _evaluation(
    config: PretrainConfig, plan: Plan, measure: Measure | None
) -> Callable[[nn.Module, Fabric], Evaluated]:
    if measure is not None:
        # The task's network is a student, which mypy can't know.
        return lambda student, _: Evaluated(measure(student))  # type: ignore[arg-type]
    return StudentKnn(config, plan)


def describe(config: PretrainConfig, plan: Plan) -> dict[str, Any]:
    """The run's description: what a resumed call must agree with, and what is needed to load its encoder."""
    scales = plan.stores[0]
    info = scales[-1].info
    return {
        "target_dims": list(plan.target.dims),
        "store": {
            "images": len(scales[0]),
            "images_sha256": info.images_sha256,
            "middle_sizes": [store.info.middle_size for store in scales],
            "patch_size": info.patch_size,
            "shard_size": info.shard_size if plan.shuffle_window else None,
            "channels": info.channels,
            "codec": info.codec,
            "flips": info.flips,
            "pixels": info.pixels,
            "jpeg_quality": info.jpeg_quality,
            "normalisation": [list(values) for values in scales[-1].normalisation],
            "resize": info.resize,
            **range_entry(info.value_range),
            "teachers": [stores[-1].info.teacher for stores in plan.stores],
        },
    }


def _absolute(location: str) -> str:
    """A store's absolute path; a URL as it is."""
    return location if is_url(location) else str(Path(location).resolve())


def _headline(config: PretrainConfig, plan: Plan, student: AnyStudent) -> str:
    millions = sum(parameter.numel() for parameter in student.encoder.parameters()) / 1e6
    norm = "" if config.target == "pixels" else f", norm {', '.join(plan.norms)}"
    relations = f", relations {config.relation_weight:g}" if config.relation_weight else ""
    return (
        f"{config.encoder} ({millions:.1f} M) at {config.image_size} px, patch {plan.patch_size}: "
        f"{student.visible} of {student.patches} patches visible{'' if student.has_decoder else ', no decoder'}; "
        f"target {config.target}{norm}, loss {', '.join(dict.fromkeys(plan.losses))}{relations}"
    )
