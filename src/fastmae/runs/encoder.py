"""What RUN names in every command after pre-training -> an encoder, with all that must be known to use it and to build it again.

RUN is a run (its folder or a checkpoint), what `fastmae export` wrote for timm, a checkpoint of MAE's, DINO's or iBOT's own
(`file/PATH`, or the path alone), or a name of timm's (`timm/NAME`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from fastmae.errors import InputError, first_line
from fastmae.runs.checkpoint import is_checkpoint
from fastmae.runs.folder import RUN_FILE
from fastmae.runs.load import encoder_of, load_run
from fastmae.student.encoder import Encoder, timm_arguments
from fastmae.student.student import Student
from fastmae.teachers.factory import load_network
from fastmae.teachers.weights import load_strictly, read_weights

EXPORT_CONFIG, EXPORT_WEIGHTS = "config.json", "model.safetensors"
"""Of a folder as timm keeps models on the hub."""


class NotAViTError(InputError):
    """What was named is a network of timm's, but not one that can be pre-trained here.

    Args:
        message: in one line.
        network: the same.
    """

    def __init__(self, message: str, network: torch.nn.Module):
        super().__init__(message)
        self.network = network


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder and how to use it.

    Attributes:
        network: a timm VisionTransformer or Eva without a classifier, in evaluation mode.
        architecture: `timm.create_model(architecture, **arguments)` builds it again.
        arguments: the same.
        image_size: side in pixels that it is set to.
        channels: of its images.
        mean: by which its images are normalised, for each channel (of values in [0, 1]).
        std: the same.
        resize: how pictures came to its size in pre-training, a key of `images.middle.RESIZE`.
        source: what was opened, as it was given.
    """

    network: Encoder
    architecture: str
    arguments: dict[str, Any]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    source: str

    @property
    def patch_size(self) -> int:
        """In pixels."""
        return int(self.network.patch_embed.patch_size[0])

    def describe(self, prefix: str = "encoder.") -> dict[str, Any]:
        """For a run's description: all that is needed to build it again, and what its weights were at the start.

        Args:
            prefix: of its weights' names in the run's checkpoint.
        """
        return {
            "architecture": self.architecture,
            "arguments": {**self.arguments, "img_size": self.image_size},
            "prefix": prefix,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "source": self.source,
            "weights_sha256": _digest(self.network),
        }


def open_encoder(
    spec: str,
    image_size: int | None = None,
    *,
    weights: Path | None = None,
    pretrained: bool = True,
    drop_path: float = 0.0,
    any_size: bool = False,
) -> OpenedEncoder:
    """Load an encoder.

    Args:
        spec: RUN, as the module says.
        image_size: side in pixels that it is set to, position embeddings resampled; None: its own.
        weights: file for a timm/NAME, instead of the hub's.
        pretrained: False gives the same architecture at random (drawn from torch's generator).
        drop_path: rate of stochastic depth at the last block, growing linearly from 0 at the first.
        any_size: the network then takes images of any sides that are multiples of its patch, positions resampled on the way.

    Raises:
        InputError: nothing that can be opened, not a ViT, or a size that its patches don't divide.
    """
    extra: dict[str, Any] = {"dynamic_img_size": True} if any_size else {}
    extra |= {"drop_path_rate": drop_path} if drop_path else {}
    path = Path(spec)
    if spec.startswith(("timm/", "clip/", "file/")):
        opened = _of_name(spec, weights, pretrained, extra)
    elif weights is not None:
        raise InputError(f"--weights {weights}: goes with timm/NAME; {spec} brings its own")
    elif (path / EXPORT_CONFIG).is_file() or (
        path.suffix == ".safetensors" and path.with_name(EXPORT_CONFIG).is_file()
    ):
        opened = _of_export(path if path.is_dir() else path.parent, pretrained, extra)
    elif path.is_file() and not is_checkpoint(path):
        opened = _of_name(f"file/{spec}", weights, pretrained, extra)
    else:
        opened = _of_run(spec, pretrained, extra)
    kind = type(opened.network)
    if kind not in (VisionTransformer, Eva):
        raise NotAViTError(
            f"{spec}: a {kind.__name__}, not a plain ViT; take one of timm's vit_* or eva* names", opened.network
        )
    return _at_size(opened, image_size)


def initialise_student(student: Student, spec: str) -> str:
    """Give a student the weights that `--init` names: the encoder's, and where it is a run with the same decoder and heads, theirs too.

    Position embeddings are taken over, resampled to the student's grid, and not built anew: MAE's own order their columns in another way.

    Returns:
        What was loaded, in words.

    Raises:
        InputError: an encoder of another shape.
    """
    encoder = student.encoder
    opened = open_encoder(spec, encoder.patch_embed.img_size[0])
    state = {name.replace("fc_norm.", "norm."): tensor for name, tensor in opened.network.state_dict().items()}
    own = encoder.state_dict()
    differing = next(
        (
            name
            for name in (*own, *state)
            if name not in own or name not in state or own[name].shape != state[name].shape
        ),
        None,
    )
    if differing is not None:
        mine, theirs = (list(weights[differing].shape) if differing in weights else "none" for weights in (own, state))
        raise InputError(
            f"--init {spec}: another encoder ({differing}: {theirs}, the student's {mine}); give the --encoder it was made with"
        )
    encoder.load_state_dict(state)
    around = _around_the_encoder(student, spec)
    if not around:
        return f"the encoder of {spec}"
    student.load_state_dict(around, strict=False)
    return f"the whole student of {spec}"


def _around_the_encoder(student: Student, spec: str) -> dict[str, torch.Tensor]:
    """A run's decoder and heads, if the student's are of the same names and shapes."""
    path = Path(spec)
    if not ((path / RUN_FILE).is_file() or (path.is_file() and is_checkpoint(path))):
        return {}
    own, saved = (
        {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.")}
        for weights in (student.state_dict(), load_run(path)[1])
    )
    return saved if {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in saved.items()} else {}


def _of_run(spec: str, pretrained: bool, extra: dict[str, Any]) -> OpenedEncoder:
    path = Path(spec)
    if not path.exists() or not ((path / RUN_FILE).is_file() or path.is_file()):
        what = "holds no run and no exported model" if path.exists() else "no such run"
        raise InputError(
            f"{spec}: {what}; give a run's folder, a checkpoint, an exported model, timm/NAME or file/PATH"
        )
    description, saved = load_run(path)
    network = encoder_of(description, saved, pretrained, extra)
    if "encoder" in description:
        built = description["encoder"]
        return OpenedEncoder(
            network, built["architecture"], {**built["arguments"], "num_classes": 0}, built["image_size"], built["channels"],
            tuple(built["mean"]), tuple(built["std"]), built["resize"], spec,
        )  # fmt: skip
    options, store = description["options"], description["store"]
    name, size, channels = options["encoder"], options["image_size"], store["channels"]
    width, depth, heads = (options[f"encoder_{what}"] for what in ("width", "depth", "heads"))
    arguments = timm_arguments(name, size, store["patch_size"], width, depth, heads, channels)
    mean, std = (tuple(values) for values in store["normalisation"])
    return OpenedEncoder(network, name, arguments, size, channels, mean, std, store["resize"], spec)


def _of_name(spec: str, weights: Path | None, pretrained: bool, extra: dict[str, Any]) -> OpenedEncoder:
    if spec.startswith("file/") and not pretrained:
        raise InputError(f"{spec}: with --no-pretrained there is nothing to read from a file; give timm/NAME")
    loaded, _ = load_network(spec, weights, pretrained, **extra)
    network: Any = loaded
    own = network.pretrained_cfg
    size = int(own["input_size"][-1])
    arguments = own.get("arguments", {"num_classes": 0, "img_size": size})
    return OpenedEncoder(
        network.eval(),
        own["architecture"],
        arguments,
        size,
        int(own["input_size"][0]),
        tuple(own["mean"]),
        tuple(own["std"]),
        "whole",
        spec,
    )


def _of_export(folder: Path, pretrained: bool, extra: dict[str, Any]) -> OpenedEncoder:
    file = folder / EXPORT_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        own, arguments = config["pretrained_cfg"], config.get("model_args", {})
        network: Any = timm.create_model(config["architecture"], **{"num_classes": 0, **arguments}, **extra)
        size, channels = int(own["input_size"][-1]), int(own["input_size"][0])
        mean, std, resize = tuple(own["mean"]), tuple(own["std"]), config.get("fastmae", {}).get("resize", "whole")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{file}: not the description of a timm model ({first_line(error)}); export one with --format timm"
        ) from error
    if pretrained:
        load_strictly(network, read_weights(folder / EXPORT_WEIGHTS), folder / EXPORT_WEIGHTS)
    network.reset_classifier(0)
    arguments = {**arguments, "num_classes": 0, "img_size": size}
    return OpenedEncoder(
        network.eval(), config["architecture"], arguments, size, channels, mean, std, resize, str(folder)
    )


def _at_size(opened: OpenedEncoder, size: int | None) -> OpenedEncoder:
    patch = opened.patch_size
    if size is None or size == opened.image_size:
        return opened
    if size < patch or size % patch:
        raise InputError(
            f"--image-size {size}: not a multiple of the patch of {patch} px; take {max(patch, size // patch * patch)}"
        )
    opened.network.set_input_size(img_size=(size, size))
    fields = {**vars(opened), "image_size": size, "arguments": {**opened.arguments, "img_size": size}}
    return OpenedEncoder(**fields)


def _digest(network: torch.nn.Module) -> str:
    """SHA-256 over all weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.dim()
            else str(tensor.item()).encode()
        )
    return digest.hexdigest()


def load_encoder(run: str | Path, image_size: int | None = None, trained: bool = True, **extra: Any) -> Encoder:
    """A run's encoder as a timm VisionTransformer, in evaluation mode.

    Args:
        run: a run's folder, or a checkpoint file.
        image_size: another image size than the run's views, in pixels; position embeddings are resampled.
        trained: False gives the same architecture at random.
        extra: arguments of timm's besides (`dynamic_img_size`, `drop_path_rate`).

    Raises:
        InputError: no such run, or a damaged checkpoint.
    """
    description, weights = load_run(Path(run))
    encoder = encoder_of(description, weights, trained, extra)
    if image_size is not None and (image_size, image_size) != encoder.patch_embed.img_size:
        encoder.set_input_size(img_size=(image_size, image_size))
    return encoder
