"""A run loaded back from disk: its student, or the parts of its encoder."""

from pathlib import Path
from typing import Any

import torch

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.outside.networks import checked_arguments, network_of, on_meta
from fastmae.outside.tensors import Weights, check_fit, load_into
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.description import Description, naming
from fastmae.runs.folder import CHECKPOINT_FILE, read_run
from fastmae.student.encoder import Encoder, architecture_of, build_encoder, names_plain_vit, timm_arguments
from fastmae.student.feature_map import accepted_arguments, build_network, network_arguments
from fastmae.student.student import AnyStudent, build_student


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
    own = {name: value for name, value in description["options"].items() if name not in PretrainConfig.may_change}
    with naming(run):
        return PretrainConfig(**own, stores=(), run=run)


def load_student(run: Path) -> tuple[Description, AnyStudent]:
    """A pre-training run's description and its student in evaluation mode, with decoder and heads."""
    description, weights = load_run(run)
    if "store" not in description:
        raise InputError(f"{run}: a run of `fastmae {description['task']}`; give one of `fastmae pretrain`")
    store, target_dim = description["store"], sum(description["target_dims"])
    options, sizes = options_of_run(run, description), (store["patch_size"], target_dim, store["channels"])
    with torch.inference_mode(False), naming(run):  # some students try out their network's gradients
        check_fit(build_student(options, *sizes, on="meta"), weights, run)
        student = build_student(options, *sizes)
    load_into(student, weights, run)
    return description, student.eval()


def encoder_of(
    description: Description, weights: Weights, trained: bool, extra: dict[str, Any], name: object = "the run"
) -> Encoder:
    """The encoder of a run, in evaluation mode, at the run's own image size.

    Args:
        description: from `load_run`.
        weights: from `load_run`.
        trained: False gives the same architecture with random weights.
        extra: more arguments of timm's (`dynamic_img_size`, `drop_path_rate`).
        name: of the run, for messages.

    Raises:
        InputError: a run without an encoder, or one that can't be built or does not have these weights.
    """
    with naming(name):
        if "encoder" in description:
            return _encoder_of_supervised_run(description, weights, trained, extra, name).eval()
        if "store" in description:
            return _encoder_of_pretraining_run(description, weights, trained, extra, name).eval()
    raise InputError(
        f"{name}: a run of `fastmae {description['task']}` holds no encoder; give the run that it was made from"
    )


def _encoder_of_pretraining_run(
    description: Description, weights: Weights, trained: bool, extra: dict[str, Any], name: object
) -> Encoder:
    network, image_size, *_, channels = _encoder_sizes(description)
    own = weights_below("encoder.", weights)
    skeleton = on_meta(architecture_of(network), encoder_arguments(description), name)
    if trained:
        check_fit(skeleton, own, name)
    if names_plain_vit(network):
        encoder = build_encoder(*_encoder_sizes(description), **extra)
    else:
        encoder = build_network(network, image_size, channels, **extra)
    if trained:
        load_into(encoder, own, name)
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
    description: Description, weights: Weights, trained: bool, extra: dict[str, Any], name: object
) -> Encoder:
    recorded = description["encoder"]
    architecture, arguments = recorded["architecture"], recorded["arguments"]
    checked_arguments(architecture, arguments, name)
    own = weights_below(recorded["prefix"], weights) if trained else None
    encoder: Encoder = network_of(architecture, arguments, name, own, **accepted_arguments(architecture, extra))
    encoder.reset_classifier(0)
    return encoder


def weights_below(prefix: str, weights: Weights) -> Weights:
    """The weights of one module, by their names within it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
