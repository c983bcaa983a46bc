"""A run loaded back from disk: its student, or the parts of its encoder."""

from pathlib import Path
from typing import Any

import timm
import torch

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import CHECKPOINT_FILE, read_run
from fastmae.student.encoder import Encoder, build_encoder, names_plain_vit, timm_arguments
from fastmae.student.feature_map import accepted_arguments, build_network, network_arguments
from fastmae.student.student import AnyStudent, build_student

Description = dict[str, Any]
Weights = dict[str, torch.Tensor]


def load_run(run: Path) -> tuple[Description, Weights]:
    """A run's description and its network's weights (or their moving average), from its folder or a checkpoint.

    Raises:
        InputError: neither, or damaged.
    """
    if run.is_dir():
        read_run(run)
        run = run / CHECKPOINT_FILE
    saved = load_checkpoint(run)
    return saved["run"], saved.get("ema", saved["model"])


def options_of_run(run: Path, description: Description) -> PretrainConfig:
    """The options of a pre-training run, without its stores."""
    return PretrainConfig(stores=(), run=run, **description["options"])


def load_student(run: Path) -> tuple[Description, AnyStudent]:
    """A pre-training run's description and its student in evaluation mode, with decoder and heads."""
    description, weights = load_run(run)
    store, target_dim = description["store"], sum(description["target_dims"])
    with torch.inference_mode(False):  # some students try out their network's gradients
        student = build_student(options_of_run(run, description), store["patch_size"], target_dim, store["channels"])
    student.load_state_dict(weights)
    return description, student.eval()


def encoder_of(description: Description, weights: Weights, trained: bool, extra: dict[str, Any]) -> Encoder:
    """The encoder of a run, in evaluation mode, at the run's own image size.

    Args:
        description: from `load_run`.
        weights: from `load_run`.
        trained: False gives the same architecture with random weights.
        extra: more arguments of timm's (`dynamic_img_size`, `drop_path_rate`).

    Raises:
        InputError: a run without an encoder.
    """
    if "encoder" in description:
        return _encoder_of_supervised_run(description, weights, trained, extra).eval()
    if "store" in description:
        return _encoder_of_pretraining_run(description, weights, trained, extra).eval()
    raise InputError(
        f"a run of `fastmae {description.get('task')}` holds no encoder; give the run that it was made from"
    )


def _encoder_of_pretraining_run(
    description: Description, weights: Weights, trained: bool, extra: dict[str, Any]
) -> Encoder:
    name, image_size, *_, channels = _encoder_sizes(description)
    is_vit = names_plain_vit(name)
    if is_vit:
        encoder = build_encoder(*_encoder_sizes(description), **extra)
    else:
        encoder = build_network(name, image_size, channels, **extra)
    if trained:
        encoder.load_state_dict(weights_below("encoder.", weights))
    return encoder


def encoder_arguments(description: Description) -> dict[str, Any]:
    """The arguments with which `timm.create_model` builds a pre-training run's encoder."""
    name, image_size, *_, channels = _encoder_sizes(description)
    if names_plain_vit(name):
        return timm_arguments(*_encoder_sizes(description))
    return network_arguments(name, image_size, channels)


def _encoder_sizes(description: Description) -> tuple[str, int, int, int | None, int | None, int | None, int]:
    """Name and sizes of a pre-training run's encoder, as `build_encoder` and `timm_arguments` take them."""
    options, store = description["options"], description["store"]
    width, depth, heads = (options[f"encoder_{size}"] for size in ("width", "depth", "heads"))
    return options["encoder"], options["image_size"], store["patch_size"], width, depth, heads, store["channels"]


def _encoder_of_supervised_run(
    description: Description, weights: Weights, trained: bool, extra: dict[str, Any]
) -> Encoder:
    recorded = description["encoder"]
    more = accepted_arguments(recorded["architecture"], extra)
    encoder: Encoder = timm.create_model(recorded["architecture"], **recorded["arguments"], **more)
    if trained:
        encoder.load_state_dict(weights_below(recorded["prefix"], weights))
    encoder.reset_classifier(0)
    return encoder


def weights_below(prefix: str, weights: Weights) -> Weights:
    """The weights of one module, by their names within it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
