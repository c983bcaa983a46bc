"""A teacher's name -> its network with weights. What is done with the network is in `teacher`."""

import contextlib
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import huggingface_hub
import msgspec
import timm
from torch import nn

from fastmae.config import OFFLINE_TEACHER
from fastmae.config.resolve import shown
from fastmae.config.teacher import PYTHON, GivenTeacher
from fastmae.errors import InputError
from fastmae.outside.documents import checked
from fastmae.outside.networks import check_architecture, create_network
from fastmae.outside.tensors import Weights, load_into
from fastmae.runtime.progress import Progress
from fastmae.teachers.checkpoint_file import load_checkpoint_file
from fastmae.teachers.efficientnet_lite import LITES, load_efficientnet_lite
from fastmae.teachers.huggingface import load_huggingface
from fastmae.teachers.python_network import load_python
from fastmae.teachers.teacher import RGB, Teacher
from fastmae.teachers.weights import read_weights, weights_of

HUB_ERRORS = (OSError, RuntimeError, ValueError)
HUB_TIMEOUT = 5  # seconds
CLIPS = {
    "ViT-B-32": "vit_base_patch32_clip_quickgelu_224.openai",
    "ViT-B-16": "vit_base_patch16_clip_quickgelu_224.openai",
    "ViT-L-14": "vit_large_patch14_clip_quickgelu_224.openai",
    "ViT-L-14@336px": "vit_large_patch14_clip_quickgelu_336.openai",
}
"""OpenAI's names of its CLIP models (with - for /) -> timm's image encoders, with the activation of their training."""


def load_teacher(
    spec: str,
    middle_size: int,
    grid: int,
    weights: Path | None = None,
    block: int | None = None,
    norm: str = "auto",
    input_size: int | None = None,
    last: int = 1,
    channels: Sequence[int] = RGB,
) -> Teacher:
    """Load a frozen teacher by name. `spec` and `weights` are those of `load_network`, the others those of `Teacher`.

    Raises:
        InputError: an unknown name, weights that do not match, or a hub that can't be reached.
    """
    network, weights_file = load_network(spec, weights)
    return Teacher(spec, network, middle_size, grid, block, norm, input_size, last, weights_file, channels)


class StoredTeacher(msgspec.Struct):
    """What `Teacher.describe` writes into a store, as far as it says how to load the teacher again."""

    spec: Annotated[str, msgspec.Meta(max_length=4096)]
    block: Annotated[int, msgspec.Meta(ge=0, le=1023)]
    last: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    norm: Literal["final", "layer", "none"]
    input_size: Annotated[int, msgspec.Meta(ge=1, le=16384)]
    channels: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=1023)]], msgspec.Meta(min_length=3, max_length=3)]
    weights_sha256: str
    weights_file: str | None
    precision: Literal["32-true", "tf32", "bf16-mixed", "16-mixed"] = "32-true"


def teacher_of_store(
    description: dict[str, Any],
    middle_size: int,
    grid: int,
    name: object = "the store's teacher",
    given: str | None = None,
) -> Teacher:
    """Load the teacher that made a store. Of what the store names, only weights are read, never code.

    For a teacher that is code, the user says where it is.

    Args:
        description: what `Teacher.describe` wrote into the store.
        middle_size: side of the store's middle images, in pixels.
        grid: patches along that side.
        name: where the description stands, for messages.
        given: the name of the same teacher by the user, `--teacher`; it is loaded instead of what the store names.

    Raises:
        InputError: a description that is none, the weights are not available, or are no longer the same, or the teacher
            is code and is not given.
    """
    recorded = checked(description, StoredTeacher, name=f"{name}: its teacher", way_out="tokenize the images again")
    spec, weights_file = recorded.spec, recorded.weights_file
    if given is not None:
        spec, weights_file = given, None
    elif spec.startswith(PYTHON):
        raise InputError(
            f"{name}: its teacher is code ({shown(spec)!r}), which no store may run; if you have that code, name it "
            "yourself: --teacher python/MODULE:FUNCTION"
        )
    if weights_file and spec not in LITES and not Path(weights_file).is_absolute():
        raise InputError(
            f"{name}: its teacher's weights file '{weights_file}' is no absolute path; it was changed by hand"
        )
    if weights_file and spec.startswith(("file/", "hf/")):
        # The name may hold a path relative to another working folder; the recorded path is absolute.
        spec, weights_file = f"{spec.split('/')[0]}/{weights_file}", None
    elif spec in LITES:  # a package's name is recorded, not a file
        weights_file = None
    teacher = load_teacher(
        spec,
        middle_size,
        grid,
        weights=Path(weights_file) if weights_file else None,
        block=recorded.block,
        norm=recorded.norm,
        input_size=recorded.input_size,
        last=recorded.last,
        channels=recorded.channels,
    )
    if teacher.weights_sha256 != recorded.weights_sha256:
        raise InputError(f"{spec}: its weights are not those that made the store (SHA-256 differs)")
    teacher.precision = recorded.precision
    return teacher


def load_network(
    spec: str, weights: Path | None = None, pretrained: bool = True, **extra: Any
) -> tuple[nn.Module, str | None]:
    """The bare network, without its classifier.

    Args:
        spec: `timm/NAME`, `hf/NAME`, `clip/NAME`, `file/PATH`, `python/MODULE:FUNCTION`, `efficientnet-lite0` or
            `efficientnet-lite2`. A `python/` one must come from the user, since its code is run.
        weights: for timm/NAME and clip/NAME, a file in timm's layout instead of the hub's weights.
        pretrained: False leaves the weights of a timm/NAME at random.
        extra: more arguments for timm's models (`dynamic_img_size`, `drop_path_rate`).

    Returns:
        The network, and the file or package with its weights; None for weights from the hub and for random ones.

    Raises:
        InputError: an unknown name, weights that do not match, or a hub that can't be reached.
    """
    kind, _, name = spec.partition("/")
    is_code = isinstance(spec, GivenTeacher) or kind == PYTHON.rstrip("/")
    if weights is not None and (spec in LITES or is_code or kind in ("hf", "file")):
        raise InputError(f"{spec} brings its own weights; leave the weights file out, or name a timm/NAME for it")
    if spec in LITES:
        return load_efficientnet_lite(spec)
    if is_code:
        return load_python(spec), None
    if kind == "hf" and name:
        folder = Path(name)
        with contextlib.nullcontext() if folder.exists() else _hub_or_cache(), _loading(spec):
            return load_huggingface(spec, name), str(folder.absolute()) if folder.exists() else None
    if kind == "file" and name:
        return load_checkpoint_file(Path(name), **extra)
    if kind not in ("timm", "clip"):
        raise InputError(
            f"no teacher '{spec}'; give timm/NAME, hf/NAME, clip/NAME, file/PATH, python/MODULE:FUNCTION, "
            f"{' or '.join(LITES)}"
        )
    model_name = name if kind == "timm" else CLIPS.get(name.replace("/", "-"), "")
    if not model_name:
        raise InputError(f"{spec}: no such CLIP; there are {', '.join(f'clip/{known}' for known in CLIPS)}")
    return _load_timm(spec, model_name, weights, pretrained, **extra)


def _load_timm(
    spec: str, name: str, weights: Path | None, pretrained: bool, **extra: Any
) -> tuple[nn.Module, str | None]:
    """A timm model with weights from a file, from the hub, or at random."""
    check_architecture(name, spec)
    if weights is None and pretrained:
        return _load_from_hub(spec, name, **extra), None
    model = create_network(name, {"num_classes": 0, **extra}, spec)
    if weights is None:
        return model, None
    state = weights_of(model.state_dict().keys(), read_weights(weights), weights)
    state = _without_classifier(state, model)
    _take_image_size(model, state)
    load_into(model, state, weights)
    return model, str(weights.absolute())


def _take_image_size(model: Any, state: Weights) -> None:
    """Set a ViT's image size to the one that its weights were trained at, which their position embeddings tell.

    So these are loaded as they are, and resampled once for the size that is asked for.
    """
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or own.dim() != 3 or given.dim() != 3 or not hasattr(model, "set_input_size"):
        return
    prefix = own.shape[1] - model.patch_embed.num_patches
    grid = math.isqrt(max(0, given.shape[1] - prefix))
    if given.shape[1] != own.shape[1] and given.shape[1] == prefix + grid**2 and given.shape[2] == own.shape[2]:
        size = grid * int(model.patch_embed.feat_ratio())
        model.set_input_size(img_size=(size, size))
        channels = model.pretrained_cfg["input_size"][0]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, size, size)}


def _load_from_hub(spec: str, name: str, **extra: Any) -> nn.Module:
    with _hub_or_cache() as is_reachable:
        try:
            with _loading(spec):
                return timm.create_model(name, pretrained=True, num_classes=0, **extra)
        except HUB_ERRORS as error:
            cause = " ".join(str(error).split())[:160] if is_reachable else "no network, and not in the local cache"
            raise InputError(
                f"{spec}: its weights can't be had from the hub ({cause}); give a file with them (--teacher-weights, "
                f"--weights), or take {OFFLINE_TEACHER}, which needs no network"
            ) from error


def _loading(spec: str) -> Progress:
    """In a log. On a terminal, the hub's client draws a bar of what it downloads."""
    return Progress(f"load {spec}", minor=True, style="nothing")


@contextlib.contextmanager
def _hub_or_cache() -> Iterator[bool]:
    """Whether the hub answers. If not, its client is offline in here: it serves its cache, and fails at once."""
    constants, is_reachable = huggingface_hub.constants, _hub_answers()
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not is_reachable
    try:
        yield is_reachable
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _hub_answers() -> bool:
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True  # an error from the hub is an answer too
    except (OSError, ValueError):
        return False


def _without_classifier(state: Weights, model: Any) -> Weights:
    """Leave out the classifier's tensors, which a teacher does not use. All others must match the model."""
    classifiers = model.pretrained_cfg.get("classifier") or "head"
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    prefixes = tuple(f"{name}." for name in names)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
