"""`fastmae pretrain`: a token store in, a run with a trained encoder out (Sec. 3.2.4, Fig. 3b)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.pretraining.knn_every import knn_of_student, labelled_images
from fastmae.pretraining.plan import Plan, plan
from fastmae.pretraining.profile import profile
from fastmae.pretraining.step import launch_for, optimizer_for, step_function, view_loader
from fastmae.runs.encoder import initialise_student
from fastmae.runs.folder import INPUTS_FILE, RunFolder, read_metrics
from fastmae.runtime.device import memory_hint
from fastmae.runtime.durable import write_json
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process
from fastmae.runtime.peers import ends_with_its_peers
from fastmae.student.student import Student, build_student
from fastmae.tokens.files import is_url
from fastmae.training.evaluation import Evaluation
from fastmae.training.loop import fit
from fastmae.training.optimiser import cosine_schedule
from fastmae.training.state import TrainState
from fastmae.training.task import micro_batches

NOT_OF_THE_RUN = (
    "stores", "run", "config", "print_config", "json", "resume", "device", "devices", "strategy", "workers", "save_every", "recipe",
    "micro_batch", "compile", "checkpoint_activations", "on_damage", "cache", "cache_size",
    "profile", "knn_every", "knn_data",
)  # fmt: skip
"""Options that may change when a run is continued: they change where and how fast it trains, not what."""
KNN_BATCH = 64
"""Images a forward, while measuring."""


@ends_with_its_peers
def pretrain(
    config: PretrainConfig, measure: Callable[[Any], Mapping[str, float]] | None = None
) -> dict[str, Any] | None:
    """Train a run to its end, or continue it; the command's JSON (None in all processes but the first).

    Args:
        config: the options.
        measure: takes the student, every `knn_every` epochs; None: its k-NN accuracy, where that is asked for.
    """
    if config.profile:
        return profile(config)
    made = plan(config)
    labelled = (
        labelled_images(config.knn_data, made.stores[0][0], config.image_size)
        if config.knn_every and measure is None
        else None
    )
    images, steps = len(made.stores[0][0]), made.steps
    fabric = launch_for(config)
    if config.batch_size % fabric.world_size:
        raise InputError(f"--batch-size {config.batch_size}: not a multiple of the {fabric.world_size} processes")
    parts = micro_batches(config.batch_size // fabric.world_size, config.micro_batch)
    description = describe(config, made)
    on_first_process(fabric, lambda: RunFolder(config.run, description, config.resume))
    on_first_process(
        fabric,
        lambda: write_json(config.run / INPUTS_FILE, {"stores": [_from_anywhere(store) for store in config.stores]}),
    )
    folder = RunFolder(config.run, description, resume=True)

    def build() -> Student:
        return build_student(config, made.patch_size, made.target_dim, made.channels)

    student = build()
    begun_with = initialise_student(student, config.init) if config.init and not folder.checkpoint.exists() else ""
    ema = ModelEmaV3(student, config.ema, use_warmup=True, device=fabric.device) if config.ema else None
    model = fabric.setup_module(cast(nn.Module, torch.compile(student)) if config.compile else student)
    optimizer = optimizer_for(config, student, fabric)
    warmup = min(round(config.warmup_epochs * images / config.batch_size), steps // 2)
    schedule = cosine_schedule(optimizer, steps, warmup, config.min_lr)
    state = TrainState(student, model, fabric.setup_optimizers(optimizer), description, ema)
    state.restore(fabric, folder)
    if fabric.is_global_zero:
        _announce(config, made, student, parts, state.step, fabric)
        if begun_with:
            print(f"begins with {begun_with}")
    share = config.batch_size // fabric.world_size // parts
    if labelled is not None:
        measure = knn_of_student(labelled, made.stores[0][-1].normalisation, fabric, KNN_BATCH, config.workers, build)
    evaluation = (
        Evaluation(math.ceil(config.knn_every * images / config.batch_size), measure) if measure is not None else None
    )
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
            steps_per_epoch=images / config.batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
            clip_grad=config.clip_grad,
            save_every=config.save_every,
            log_every=config.log_every,
            parts=parts,
            evaluation=evaluation,
        )
    if not fabric.is_global_zero:
        return None
    entry = entry or _last_entry(folder)
    print(
        f"{config.run}: {steps} steps, loss {entry['loss']:.4f}, {entry['seconds']:.0f} s; next: fastmae knn {config.run} DATA"
    )
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


def _from_anywhere(location: str) -> str:
    """A store's path from the root; a URL as it is."""
    return location if is_url(location) else str(Path(location).resolve())


def describe(config: PretrainConfig, made: Plan) -> dict[str, Any]:
    """What the run is: all that a resumed call must agree with, and all that is needed to load its encoder."""
    options = {name: value for name, value in asdict(config).items() if name not in NOT_OF_THE_RUN}
    scales = made.stores[0]
    info = scales[-1].info
    return {
        "fastmae run": 1,
        "options": {
            **options,
            "norm": made.norms[0] if len(set(made.norms)) == 1 else "auto",
            "shuffle_window": made.shuffle_window,
        },
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


def _announce(config: PretrainConfig, made: Plan, student: Student, parts: int, done: int, fabric: Fabric) -> None:
    millions = sum(p.numel() for p in student.encoder.parameters()) / 1e6
    from_step = ", all done before" if done == made.steps else f", from step {done}" if done else ""
    in_parts = f" in {parts} parts" if parts > 1 else ""
    what = f"{config.target}, norm {', '.join(made.norms)}" if config.target != "pixels" else "pixels"
    print(
        f"{config.encoder} ({millions:.1f} M) at {config.image_size} px, patch {made.patch_size}: "
        f"{student.visible} of {student.patches} patches visible; target {what}; "
        f"{len(made.stores[0][0])} images, {config.epochs} epochs = {made.steps} steps of {config.batch_size}{in_parts}{from_step}; "
        f"lr {config.base_lr * config.batch_size / 256:.2e}; {fabric.world_size} x {fabric.device.type}"
    )
