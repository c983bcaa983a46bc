"""What RUN names in the commands after pre-training: an encoder, with what is needed to use it and to build it again.

RUN is a run (its folder or a checkpoint), a model that `fastmae export` wrote for timm, a checkpoint of MAE, DINO or
iBOT as its authors publish it (`file/PATH`, or the path alone), or `timm/NAME`. The encoder is a plain ViT, or any
other network of timm that gives a feature map.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastmae.config.teacher import names_code
from fastmae.errors import InputError
from fastmae.images.value_range import AUTO, bounds_of, range_entry
from fastmae.outside.documents import read_json
from fastmae.outside.networks import check_architecture, checked_arguments, network_of
from fastmae.runs.checkpoint import is_checkpoint
from fastmae.runs.folder import RUN_FILE
from fastmae.runs.load import encoder_arguments, encoder_of, load_run
from fastmae.runs.timm_config import EXPORT_CONFIG, EXPORT_WEIGHTS, Prepared, TimmConfig
from fastmae.student.encoder import Encoder, architecture_of, is_plain_vit
from fastmae.student.feature_map import accepted_arguments, check_maps, network_arguments, resized_network
from fastmae.student.student import AnyStudent
from fastmae.teachers.factory import load_network
from fastmae.teachers.weights import read_weights


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder, and how to use it.

    Attributes:
        network: timm's network without a classifier, in evaluation mode.
        architecture: timm's name of the network.
        arguments: `timm.create_model(architecture, **arguments)` builds the network again.
        image_size: side of its images in pixels.
        channels: channels of its images.
        mean: mean of its input, one value per channel (of values in [0, 1]).
        std: standard deviation of its input.
        resize: how pictures were brought to its size in pre-training, a key of `images.middle.RESIZE`.
        source: RUN, as it was given.
        value_range: how values of more than 8 bits became 8 bits in pre-training (`images.value_range`).
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
    value_range: str = AUTO

    def __post_init__(self) -> None:
        try:
            bounds_of(self.value_range)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from error

    @property
    def is_vit(self) -> bool:
        """Whether the network is a plain ViT."""
        return is_plain_vit(self.network)

    @property
    def patch_size(self) -> int:
        """Side of a plain ViT's patch in pixels; the stride of another network's last map."""
        if self.is_vit:
            return int(self.network.patch_embed.patch_size[0])
        return int(self.network.feature_info[-1]["reduction"])

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.network.embed_dim if self.is_vit else self.network.num_features)

    @property
    def grid(self) -> int:
        """Positions along a side of the last map."""
        if self.is_vit:
            return self.image_size // self.patch_size
        return check_maps(self.source, self.network, self.image_size, self.channels)[-1]

    def at_size(self, image_size: int) -> "OpenedEncoder":
        """The same encoder, described as one for images of another size."""
        return replace(self, image_size=image_size, arguments=_sized(self.network, self.arguments, image_size))

    def describe(self, prefix: str = "encoder.") -> dict[str, Any]:
        """For a run's description: what is needed to build the encoder again, and a digest of its initial weights.

        Args:
            prefix: prefix of the encoder's weights in the run's checkpoint.
        """
        return {
            "architecture": self.architecture,
            "arguments": _sized(self.network, self.arguments, self.image_size),
            "prefix": prefix,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            **range_entry(self.value_range),
            "source": self.source,
            "weights_sha256": _digest(self.network),
        }


def load_encoder(
    run: str | Path,
    image_size: int | None = None,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    **arguments: Any,
) -> Encoder:
    """The encoder that RUN names, as timm's network without a classifier, in evaluation mode.

    It is a VisionTransformer or Eva, unless the run's `--encoder` is another network of timm's.

    Args:
        run: a run's folder or checkpoint, an exported model, a checkpoint of MAE, DINO or iBOT, or timm/NAME.
        image_size: side of the images in pixels; position embeddings are resampled. None: the encoder's own.
        weights: weights file for a timm/NAME, instead of the hub's.
        pretrained: False gives the same architecture with random weights.
        arguments: more arguments of timm's (`dynamic_img_size`, `drop_path_rate`).

    Raises:
        InputError: nothing that can be opened, a network without a feature map, or a size that it can't take.
    """
    weights_file = None if weights is None else Path(weights)
    return open_encoder(str(run), image_size, weights=weights_file, pretrained=pretrained, **arguments).network


def open_encoder(
    spec: str,
    image_size: int | None = None,
    *,
    weights: Path | None = None,
    pretrained: bool = True,
    **arguments: Any,
) -> OpenedEncoder:
    """As `load_encoder`, with what is needed to use the encoder. Random weights come from torch's generator."""
    path = Path(spec)
    if names_code(spec):
        raise InputError(f"{spec}: is a teacher, not an encoder of timm's; `fastmae knn` measures it")
    if spec.startswith(("timm/", "clip/", "file/")):
        opened = _of_name(spec, weights, pretrained, arguments)
    elif weights is not None:
        raise InputError(f"--weights {weights}: goes with timm/NAME; {spec} brings its own weights")
    elif (path / EXPORT_CONFIG).is_file() or (
        path.suffix == ".safetensors" and path.with_name(EXPORT_CONFIG).is_file()
    ):
        opened = _of_export(path if path.is_dir() else path.parent, pretrained, arguments)
    elif path.is_file() and not is_checkpoint(path):
        opened = _of_name(f"file/{spec}", weights, pretrained, arguments)
    else:
        opened = _of_run(spec, pretrained, arguments)
    return _at_size(opened, image_size)


def initialise_student(student: AnyStudent, spec: str) -> str:
    """Give a student the weights that `--init` names: an encoder's; from a run with the same decoder and heads, all.

    Position embeddings are copied and resampled to the student's grid. They can't be rebuilt: MAE orders their columns
    in its own way.

    Returns:
        What was loaded, in words.

    Raises:
        InputError: an encoder of another shape.
    """
    encoder = student.encoder
    opened = open_encoder(spec, student.image_size)
    own = encoder.state_dict()
    given = {_name_in(own, name): tensor for name, tensor in opened.network.state_dict().items()}
    differing = [name for name in {**own, **given} if _shape(own, name) != _shape(given, name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"--init {spec}: another encoder ({name}: {_shape(given, name)}, the student's {_shape(own, name)}); "
            "give the --encoder it was made with"
        )
    encoder.load_state_dict(given)
    rest = _decoder_and_heads(student, spec)
    if not rest:
        return f"the encoder of {spec}"
    student.load_state_dict(rest, strict=False)
    return f"the whole student of {spec}"


def _name_in(own: Mapping[str, Any], name: str) -> str:
    """The name of a weight in the student, whose final norm may come before the pooling or after it."""
    for before, after in (("fc_norm.", "norm."), ("norm.", "fc_norm.")):
        renamed = after + name.removeprefix(before)
        if name.startswith(before) and name not in own and renamed in own:
            return renamed
    return name


def _shape(weights: dict[str, torch.Tensor], name: str) -> list[int] | str:
    return list(weights[name].shape) if name in weights else "none"


def _decoder_and_heads(student: AnyStudent, spec: str) -> dict[str, torch.Tensor]:
    """The weights of a run's decoder and heads, if they have the student's names and shapes."""
    path = Path(spec)
    if not ((path / RUN_FILE).is_file() or (path.is_file() and is_checkpoint(path))):
        return {}
    own, saved = (
        {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.")}
        for weights in (student.state_dict(), load_run(path)[1])
    )
    alike = {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in saved.items()}
    return saved if alike else {}


def _of_run(spec: str, pretrained: bool, extra: dict[str, Any]) -> OpenedEncoder:
    path = Path(spec)
    if not path.exists() or not ((path / RUN_FILE).is_file() or path.is_file()):
        problem = "holds no run and no exported model" if path.exists() else "no such run"
        raise InputError(
            f"{spec}: {problem}; give a run's folder, a checkpoint, an exported model, timm/NAME or file/PATH"
        )
    description, weights = load_run(path)
    network = encoder_of(description, weights, pretrained, extra, spec)
    if "encoder" in description:
        recorded = description["encoder"]
        return OpenedEncoder(
            network=network,
            architecture=recorded["architecture"],
            arguments={**recorded["arguments"], "num_classes": 0},
            image_size=recorded["image_size"],
            channels=recorded["channels"],
            mean=tuple(recorded["mean"]),
            std=tuple(recorded["std"]),
            resize=recorded["resize"],
            source=spec,
            value_range=recorded.get("value_range", AUTO),
        )
    options, store = description["options"], description["store"]
    mean, std = (tuple(values) for values in store["normalisation"])
    return OpenedEncoder(
        network=network,
        architecture=architecture_of(options["encoder"]),
        arguments=encoder_arguments(description),
        image_size=options["image_size"],
        channels=store["channels"],
        mean=mean,
        std=std,
        resize=store["resize"],
        source=spec,
        value_range=store.get("value_range", AUTO),
    )


def _of_name(spec: str, weights: Path | None, pretrained: bool, extra: dict[str, Any]) -> OpenedEncoder:
    if spec.startswith("file/") and not pretrained:
        raise InputError(f"{spec}: with --no-pretrained nothing would be read from the file; give timm/NAME")
    if spec.startswith("timm/"):
        check_architecture(architecture_of(spec), spec)
        extra = accepted_arguments(architecture_of(spec), extra)
    loaded, _ = load_network(spec, weights, pretrained, **extra)
    network: Any = loaded
    own = network.pretrained_cfg
    channels, _, image_size = own["input_size"]
    if is_plain_vit(network):
        arguments = own.get("arguments", {"num_classes": 0, "img_size": image_size})
    else:
        arguments = network_arguments(own["architecture"], image_size, channels)
    return OpenedEncoder(
        network=network.eval(),
        architecture=own["architecture"],
        arguments=arguments,
        image_size=image_size,
        channels=channels,
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        resize="whole",
        source=spec,
    )


def _of_export(folder: Path, pretrained: bool, extra: dict[str, Any]) -> OpenedEncoder:
    file, way_out = folder / EXPORT_CONFIG, "export one with --format timm"
    config: TimmConfig = read_json(file, TimmConfig, way_out=f"not the description of a timm model; {way_out}")
    own, architecture = config.pretrained_cfg, config.architecture
    arguments = checked_arguments(architecture, config.arguments(), file)
    weights = read_weights(folder / EXPORT_WEIGHTS) if pretrained else None
    network = network_of(architecture, arguments, file, weights, **accepted_arguments(architecture, extra))
    network.reset_classifier(0)
    prepared = config.fastmae or Prepared()
    return OpenedEncoder(
        network=network.eval(),
        architecture=architecture,
        arguments={**_sized(network, arguments, own.image_size), "num_classes": 0},
        image_size=own.image_size,
        channels=own.channels,
        mean=tuple(own.mean),
        std=tuple(own.std),
        resize=prepared.resize,
        source=str(folder),
        value_range=prepared.value_range,
    )


def _at_size(opened: OpenedEncoder, image_size: int | None) -> OpenedEncoder:
    if not opened.is_vit:
        return _map_at_size(opened, image_size or opened.image_size)
    patch = opened.patch_size
    if image_size is None or image_size == opened.image_size:
        return opened
    if image_size < patch or image_size % patch:
        fitting = max(patch, image_size // patch * patch)
        raise InputError(
            f"--image-size {image_size}: not a multiple of the patch size, {patch} px; {fitting} would fit"
        )
    opened.network.set_input_size(img_size=(image_size, image_size))
    return opened.at_size(image_size)


def _map_at_size(opened: OpenedEncoder, image_size: int) -> OpenedEncoder:
    """A network that is no plain ViT, for images of this size. It is run once on an empty image."""
    network = opened.network
    if image_size != opened.image_size:
        network = resized_network(opened.source, network, opened.architecture, opened.arguments, image_size)
    check_maps(opened.source, network, image_size, opened.channels)
    return replace(opened, network=network).at_size(image_size)


def _sized(network: Encoder, arguments: dict[str, Any], image_size: int) -> dict[str, Any]:
    """timm's arguments for images of this size. Networks that take images of any size have no such argument."""
    if is_plain_vit(network) or "img_size" in arguments:
        return {**arguments, "img_size": image_size}
    return arguments


def _digest(network: torch.nn.Module) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        if tensor.dim():
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(str(tensor.item()).encode())
    return digest.hexdigest()
