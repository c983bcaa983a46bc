"""A teacher's name -> the network with its weights. What is done with it is `teacher`'s matter."""

import difflib
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import nn

from fastmae.config import OFFLINE_TEACHER
from fastmae.errors import InputError, first_line
from fastmae.teachers.checkpoint_file import load_checkpoint_file
from fastmae.teachers.efficientnet_lite import LITES, load_efficientnet_lite
from fastmae.teachers.huggingface import load_huggingface
from fastmae.teachers.teacher import RGB, Teacher
from fastmae.teachers.weights import load_strictly, read_weights

HUB_ERRORS = (OSError, RuntimeError, ValueError)
HUB_TIMEOUT = 5  # seconds
CLIPS = {
    "ViT-B-32": "vit_base_patch32_clip_quickgelu_224.openai",
    "ViT-B-16": "vit_base_patch16_clip_quickgelu_224.openai",
    "ViT-L-14": "vit_large_patch14_clip_quickgelu_224.openai",
    "ViT-L-14@336px": "vit_large_patch14_clip_quickgelu_336.openai",
}
"""OpenAI's names of its CLIP models (with - for /) -> timm's of their image encoders, with the activation they were trained with."""


def load_teacher(
    spec: str,
    middle_size: int,
    grid: int,
    weights: Path | None = None,
    block: int | None = None,
    norm: str = "auto",
    size: int | None = None,
    last: int = 1,
    channels: Sequence[int] = RGB,
) -> Teacher:
    """Load a frozen teacher by name; the arguments are those of `Teacher`.

    Raises:
        InputError: an unknown name, weights that don't fit, or a hub that can't be reached.
    """
    model, file = load_network(spec, weights)
    return Teacher(spec, model, middle_size, grid, block, norm, size, last, file, channels)


def teacher_of_store(description: dict[str, Any], middle_size: int, grid: int) -> Teacher:
    """The teacher that made a store, again, from what `Teacher.describe` wrote there.

    Raises:
        InputError: its weights are not to be had, or are no longer the same.
    """
    spec, own_file = description["spec"], description["weights_file"]
    if own_file and spec.startswith(("file/", "hf/")):  # its spec may be relative to another working folder
        spec, own_file = f"{spec.split('/')[0]}/{own_file}", None
    elif spec in LITES:  # what is recorded is a package's name
        own_file = None
    teacher = load_teacher(
        spec, middle_size, grid,
        Path(own_file) if own_file else None, description["block"], description["norm"], description["input_size"],
        description["last"], description["channels"],
    )  # fmt: skip
    if teacher.weights_sha256 != description["weights_sha256"]:
        raise InputError(f"{description['spec']}: its weights are not those that made the store (SHA-256 differs)")
    return teacher


def load_network(
    spec: str, weights: Path | None = None, pretrained: bool = True, **extra: Any
) -> tuple[nn.Module, str | None]:
    """The bare network, without its classifier.

    Args:
        spec: `timm/NAME`, `hf/NAME`, `clip/NAME`, `file/PATH`, `efficientnet-lite0` or `efficientnet-lite2`.
        weights: for timm/NAME and clip/NAME, a file in timm's own layout instead of the hub's.
        pretrained: False leaves a timm/NAME at random.
        extra: arguments for timm's own models besides (`dynamic_img_size`, `drop_path_rate`).

    Returns:
        The network, and the file or package that its weights came from; None for the hub or random ones.
    """
    source, _, rest = spec.partition("/")
    if weights is not None and (spec in LITES or source in ("hf", "file")):
        raise InputError(f"{spec} brings its own weights; leave the weights file out, or name a timm/NAME for it")
    if spec in LITES:
        return load_efficientnet_lite(spec)
    if source == "hf" and rest:
        if not Path(rest).exists():
            _stay_offline_without_a_hub()
        return load_huggingface(spec, rest), str(Path(rest).absolute()) if Path(rest).exists() else None
    if source == "file" and rest:
        return load_checkpoint_file(Path(rest), **extra)
    if source not in ("timm", "clip"):
        raise InputError(f"no teacher '{spec}'; give timm/NAME, hf/NAME, clip/NAME, file/PATH, or {' or '.join(LITES)}")
    name = rest if source == "timm" else CLIPS.get(rest.replace("/", "-"), "")
    if not name:
        raise InputError(f"{spec}: no such CLIP; there are {', '.join(f'clip/{known}' for known in CLIPS)}")
    if name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 1)
        raise InputError(f"{spec}: timm has no such model{f'; did you mean timm/{near[0]}' if near else ''}")
    if weights is None and pretrained:
        return _from_hub(spec, name, **extra), None
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **extra)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{spec}: timm can't build it ({first_line(error)})") from error
    if weights is None:
        return model, None
    load_strictly(model, _without_head(read_weights(weights), model), weights)
    return model, str(weights.absolute())


def _from_hub(spec: str, name: str, **extra: Any) -> nn.Module:
    reachable = _stay_offline_without_a_hub()
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **extra)
    except HUB_ERRORS as error:
        cause = " ".join(str(error).split())[:160] if reachable else "no network, and not in the local cache"
        raise InputError(
            f"{spec}: its weights can't be had from the hub ({cause}); give them as a weights file, or take "
            f"{OFFLINE_TEACHER}, which needs no network"
        ) from error


def _stay_offline_without_a_hub() -> bool:
    """Whether the hub answers. If not, its client is to serve what it has cached, and to fail at once, not after retries, on the rest."""
    reachable = _hub_answers()
    huggingface_hub.constants.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE or not reachable
    return reachable


def _hub_answers() -> bool:
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


def _without_head(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Leave out the classifier, which a teacher has no use for; everything else must fit."""
    classifier = model.pretrained_cfg.get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(f"{head}." for head in heads))}
