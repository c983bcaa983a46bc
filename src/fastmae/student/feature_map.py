"""Networks of timm that give a feature map: ResNet, ConvNeXt, EfficientNet, Swin, hybrid ViTs, and so on.

A plain ViT can be masked and has a module of its own (`encoder`). Any other network sees whole images. Its last map is
what timm's `forward_features` gives; its stages are those of timm's `forward_intermediates`.

Shapes: B images, K channels, S pixels along a side, D channels of a map of h x w positions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from fastmae.errors import InputError, first_line
from fastmae.outside.networks import check_architecture, create_network, on_meta
from fastmae.runtime.average_pool import average_pool
from fastmae.student.encoder import Encoder, architecture_of

TIMM_ERRORS = (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
"""What timm's networks raise at arguments or image sizes that they were not written for."""
OPTIONAL = ("drop_path_rate", "dynamic_img_size", "img_size", "global_pool")
"""Arguments that not all networks have: no stochastic depth, no fixed size in the first place, no class token."""


def build_network(name: str, image_size: int, channels: int, **extra: Any) -> Encoder:
    """A network without a classifier, with timm's random weights.

    Args:
        name: timm's name of it, with or without timm/ in front.
        image_size: S.
        channels: K.
        extra: more arguments of timm's (see `accepted_arguments`).

    Raises:
        InputError: timm has no such network, or can't build it for this size.
    """
    architecture = architecture_of(name)
    arguments = network_arguments(name, image_size, channels)
    return create_network(architecture, {**arguments, **accepted_arguments(architecture, extra)})


def network_arguments(name: str, image_size: int, channels: int) -> dict[str, Any]:
    """Arguments for `timm.create_model(architecture_of(name), ...)`.

    Networks of a fixed size get `img_size`. Those with a class token pool the mean of the map instead, and hybrid ViTs
    and EVA normalise before it: only the map is trained.

    Raises:
        InputError: as `build_network`.
    """
    architecture = architecture_of(name)
    _check_name(name, architecture)
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    skeleton = on_meta(architecture, arguments)
    own_size = skeleton.pretrained_cfg["input_size"][-1]
    if skeleton.pretrained_cfg.get("fixed_input_size"):
        sized = accepted_arguments(architecture, {"img_size": image_size})
        if not sized and image_size != own_size:
            raise InputError(
                f"--encoder {name}: timm can't build it for {image_size} px; it was made for {own_size} px"
            )
        arguments |= sized
    if type(skeleton) is VisionTransformer:
        arguments |= {"global_pool": "avg", "fc_norm": False}
    elif type(skeleton) is Eva:
        arguments |= {"global_pool": "avg", "use_fc_norm": False}
    elif getattr(skeleton, "global_pool", None) == "token":
        arguments |= accepted_arguments(architecture, {"global_pool": "avg"})
    return arguments


def accepted_arguments(architecture: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that timm's network of this name takes. Not all have stochastic depth, for example.

    Raises:
        InputError: it does not take one that is not in `OPTIONAL`.
    """
    accepted: dict[str, Any] = {}
    for argument, value in extra.items():
        try:
            on_meta(architecture, {"num_classes": 0, argument: value})
        except InputError:
            raise
        except TIMM_ERRORS as error:
            if argument not in OPTIONAL:
                raise InputError(f"{architecture}: {argument}={value}: {first_line(error)}") from error
            continue
        accepted[argument] = value
    return accepted


def last_map(network: Encoder, images: torch.Tensor) -> torch.Tensor:
    """The network's last map, after its own final norm: [B, K, S, S] -> [B, D, h, w]."""
    final, (stage,) = network.forward_intermediates(images, indices=1, output_fmt="NCHW")
    return _as_map(network, final, stage)


def stage_maps(network: Encoder, images: torch.Tensor) -> list[torch.Tensor]:
    """The map of each stage, [B, D, h, w] with another D, h and w in each; in place of the last one, `last_map`."""
    final, stages = network.forward_intermediates(images, output_fmt="NCHW")
    return [*stages[:-1], _as_map(network, final, stages[-1])]


def maps_of_stages(network: Encoder, images: torch.Tensor, stages: Sequence[int]) -> list[torch.Tensor]:
    """The maps of some stages as timm's `features_only` gives them: without what follows the last stage."""
    return network.forward_intermediates(images, indices=list(stages), output_fmt="NCHW", intermediates_only=True)


def pyramid_stages(network: Encoder, strides: tuple[int, ...]) -> list[int] | None:
    """Numbers of the stages whose maps have these strides, the last one of each; None if a stride has no stage."""
    number_of_stride = {info["reduction"]: number for number, info in enumerate(network.feature_info)}
    return [number_of_stride[stride] for stride in strides] if number_of_stride.keys() >= set(strides) else None


def to_grid(feature_map: torch.Tensor, side: int) -> torch.Tensor:
    """Bring a map to the tokens' grid: [B, D, h, w] -> [B, side * side, D].

    A finer map is averaged over the positions in each patch (adaptive average pooling), a coarser one interpolated
    bilinearly.
    """
    if min(feature_map.shape[-2:]) >= side:
        resized = average_pool(feature_map, side)
    else:
        resized = F.interpolate(feature_map, size=(side, side), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def check_maps(name: str, network: Encoder, image_size: int, channels: int) -> torch.Size:
    """Run the network once on an empty image, and give the shape [1, D, h, w] of its last map.

    Raises:
        InputError: it gives no map, or can't take images of this size.
    """
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"{name}: this network gives no feature map in timm; take another one")
    training = network.training
    try:
        with torch.no_grad():
            return last_map(network.eval(), _empty_image(network, image_size, channels)).shape
    except TIMM_ERRORS as error:
        raise InputError(
            f"{name}: gives no feature map of images of {image_size} px ({first_line(error)}); take another image "
            "size or network"
        ) from error
    finally:
        network.train(training)


def freeze_unread(
    network: Encoder, maps: Callable[[torch.Tensor], list[torch.Tensor]], image_size: int, channels: int
) -> None:
    """Stop training the parameters that none of the maps depends on, usually those of a classifier's head.

    They would get no gradient, and DDP would wait for it.

    Args:
        network: the network.
        maps: what is read from it: images [1, K, S, S] -> maps.
        image_size: S.
        channels: K.
    """
    training = network.training
    network.eval()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = [output.sum() for output in maps(_empty_image(network, image_size, channels))]
    gradients = torch.autograd.grad(outputs, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    network.train(training)


def resized_network(
    name: str, network: Encoder, architecture: str, arguments: Mapping[str, Any], image_size: int
) -> Encoder:
    """The network for images of another size. Only those of a fixed size (`img_size`) change.

    Raises:
        InputError: its weights don't fit another size.
    """
    if "img_size" not in arguments:
        return network
    if type(network) is VisionTransformer:  # a hybrid, whose positions are resampled
        network.set_input_size(img_size=(image_size, image_size))
        return network
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
            rebuilt: Encoder = create_network(architecture, {**arguments, "img_size": image_size})
        rebuilt.load_state_dict(network.state_dict())
    except InputError:
        raise
    except TIMM_ERRORS as error:
        raise InputError(
            f"{name}: its weights fit images of {arguments['img_size']} px alone, not {image_size} px; leave "
            "--image-size out"
        ) from error
    return rebuilt.train(network.training)


def _as_map(network: Encoder, final: Any, stage: torch.Tensor) -> torch.Tensor:
    """What `forward_features` gave, as [B, D, h, w].

    Args:
        network: the network.
        final: a map [B, D, h, w] or [B, h, w, D], or tokens [B, prefix + h * w, D].
        stage: [B, D', h, w], the map of the last stage.

    Raises:
        ValueError: no position of a map in it.
    """
    rows, cols = stage.shape[-2:]
    if torch.is_tensor(final) and final.dim() == 4:
        return final.permute(0, 3, 1, 2) if str(getattr(network, "output_fmt", "NCHW")) == "NHWC" else final
    if torch.is_tensor(final) and final.dim() == 3 and final.shape[1] >= rows * cols:
        return final[:, final.shape[1] - rows * cols :].transpose(1, 2).unflatten(2, (rows, cols))
    raise ValueError("its output is no map")


def _check_name(name: str, architecture: str) -> None:
    check_architecture(architecture, f"--encoder {name}")
    tag = architecture.partition(".")[2]
    if tag:
        raise InputError(
            f"--encoder {name}: '.{tag}' names weights; leave it out, and give --init timm/{architecture} for them"
        )


def _empty_image(network: Encoder, image_size: int, channels: int) -> torch.Tensor:
    parameter = next(network.parameters())
    return torch.zeros(1, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
