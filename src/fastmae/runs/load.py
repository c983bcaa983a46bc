"""A run and what it trained, back from the disk: the student, or its encoder alone."""

from pathlib import Path
from typing import Any

import timm
import torch

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import CHECKPOINT_FILE, read_run
from fastmae.student.encoder import Encoder, build_encoder, without_masking
from fastmae.student.student import Student, build_student


def load_run(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A run's description and its student's weights (their moving average where the run kept one), from its folder or checkpoint.

    Raises:
        InputError: neither, or damaged.
    """
    if run.is_dir():
        read_run(run)
        run = run / CHECKPOINT_FILE
    saved = load_checkpoint(run)
    return saved["run"], saved.get("ema", saved["model"])


def options_of_run(run: Path, description: dict[str, Any]) -> PretrainConfig:
    """The options that a run was made with; its stores are not among them."""
    return PretrainConfig(stores=(), run=run, **description["options"])


def load_student(run: Path) -> tuple[dict[str, Any], Student]:
    """A run's description and its student: the encoder with what was trained around it, in evaluation mode."""
    description, weights = load_run(run)
    config = options_of_run(run, description)
    student = build_student(
        config, description["store"]["patch_size"], sum(description["target_dims"]), description["store"]["channels"]
    )
    student.load_state_dict(weights)
    return description, student.eval()


def encoder_of(
    description: dict[str, Any], weights: dict[str, torch.Tensor], trained: bool, extra: dict[str, Any]
) -> Encoder:
    """The encoder out of what `load_run` gives, at the run's own image size; the other arguments as `load_encoder`'s."""
    if "encoder" not in description and "store" not in description:
        raise InputError(
            f"a run of `fastmae {description.get('task')}` holds no encoder; give the run that it was made from"
        )
    build = _of_supervised if "encoder" in description else _of_pretraining
    return build(description, weights, trained, extra).eval()


def _of_pretraining(
    description: dict[str, Any], weights: dict[str, torch.Tensor], trained: bool, extra: dict[str, Any]
) -> Encoder:
    options, store = description["options"], description["store"]
    encoder = build_encoder(
        options["encoder"], options["image_size"], store["patch_size"],
        options["encoder_width"], options["encoder_depth"], options["encoder_heads"],
        store["channels"], **extra,
    )  # fmt: skip
    if trained:
        encoder.load_state_dict(weights_below("encoder.", weights))
    return without_masking(encoder)


def _of_supervised(
    description: dict[str, Any], weights: dict[str, torch.Tensor], trained: bool, extra: dict[str, Any]
) -> Encoder:
    built = description["encoder"]
    encoder: Encoder = timm.create_model(built["architecture"], **built["arguments"], **extra)
    if trained:
        encoder.load_state_dict(weights_below(built["prefix"], weights))
    encoder.reset_classifier(0)
    return encoder


def weights_below(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of one module, by their names in it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
