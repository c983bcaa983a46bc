"""Building a network of timm from a description: its name and arguments, as a file gives them.

timm takes many arguments that do more than shape a network: they fetch files, unpickle them, or choose where they are
written. A file may only give those in `ARGUMENTS`. Nothing is ever fetched here.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import timm
import torch

from fastmae.errors import InputError, first_line
from fastmae.outside.documents import checked
from fastmae.outside.tensors import check_fit, is_lack_of_memory, load_into

LARGEST_NETWORK = 2 * 10**10
"""Most numbers in a network's weights and tables; timm's largest has a third of that."""
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""What timm raises at arguments that don't fit a network or each other."""
WAY_OUT = "give a file that fastmae or timm wrote"

Side = Annotated[int, msgspec.Meta(ge=1, le=16384)]
# Not a tuple of two: msgspec 0.22 crashes at a number with a range or a tuple of fixed length.
Sides = Side | Annotated[list[Side], msgspec.Meta(min_length=2, max_length=2)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Width = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Rate = Annotated[float, msgspec.Meta(ge=0, lt=1)]

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("img_size", "patch_size", "window_size"), Sides),
    "embed_dim": Width,
    **dict.fromkeys(("depth", "num_heads", "in_chans"), Count),
    **dict.fromkeys(("reg_tokens", "num_reg_tokens"), Annotated[int, msgspec.Meta(ge=0, le=1024)]),
    "num_classes": Annotated[int, msgspec.Meta(ge=0, le=1_000_000)],
    "mlp_ratio": Annotated[float, msgspec.Meta(gt=0, le=64)],
    "init_values": Annotated[float, msgspec.Meta(ge=0, le=1)],
    **dict.fromkeys(("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"), Rate),
    "patch_drop_rate": Rate,
    "output_stride": Literal[8, 16, 32],
    "global_pool": Literal["", "avg", "avgmax", "max", "catavgmax", "fast", "token", "map", "prr"],
    "pos_embed": Literal["", "none", "learn"],
    **dict.fromkeys(("qkv_bias", "qkv_fused", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm"), bool),
    **dict.fromkeys(("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "use_fc_norm"), bool),
    **dict.fromkeys(("swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_abs_pos_emb", "use_rot_pos_emb"), bool),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "pool_include_prefix"), bool),
}
"""The arguments of timm's that a file may give, with their types and ranges; None leaves each at the name's own."""


def check_architecture(architecture: str, name: object) -> None:
    """Check that a name is one of timm's own networks, with or without the tag of its weights.

    Args:
        architecture: `resnet50`, say; never a place to fetch from, as `hf-hub:USER/NAME`.
        name: where it stands, for messages.

    Raises:
        InputError: timm has no network of this name.
    """
    base = architecture.partition(".")[0]
    if not timm.is_model(base):
        similar = difflib.get_close_matches(base, timm.list_models(), 1)
        hint = f"; did you mean timm/{similar[0]}" if similar else ""
        raise InputError(f"{name}: timm has no network '{architecture[:80]}'{hint}")


def checked_arguments(architecture: Any, arguments: Any, name: object) -> dict[str, Any]:
    """The arguments of a description, after a check of their names, types and ranges.

    Args:
        architecture: timm's name of the network, as a file gives it.
        arguments: for `timm.create_model`, as a file gives them.
        name: of the file, for messages.

    Raises:
        InputError: another architecture than timm's own, or an argument that no file may give, or a value out of range.
    """
    check_architecture(checked(architecture, str, name=name, way_out=WAY_OUT), name)
    given = checked(arguments, dict[str, Any], name=f"{name}: its arguments", way_out=WAY_OUT)
    for argument, value in given.items():
        if argument not in ARGUMENTS:
            raise InputError(
                f"{name}: gives timm the argument '{argument[:80]}', which fastmae takes from no file; take it out of "
                f"the file, or {WAY_OUT}"
            )
        checked(value, ARGUMENTS[argument] | None, name=f"{name}: {argument}", way_out=WAY_OUT)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}: {argument}: is {value}; {WAY_OUT}")
    return given


def network_of(
    architecture: Any,
    arguments: Any,
    name: object,
    weights: Mapping[str, torch.Tensor] | None = None,
    **more: Any,
) -> Any:
    """The network that a file describes. Memory is taken only after its size is known.

    Args:
        architecture: timm's name of the network, as a file gives it.
        arguments: for `timm.create_model`, as a file gives them.
        name: of the file, for messages.
        weights: of the network, to load into it; None leaves timm's random ones.
        more: arguments that the caller gives, not a file (`drop_path_rate`).

    Raises:
        InputError: as `checked_arguments`; or timm can't build this network, it is too large, or it does not have these
            weights.
    """
    given = checked_arguments(architecture, arguments, name)
    skeleton = on_meta(architecture, {**given, **more}, name)
    if weights is not None:
        check_fit(skeleton, weights, name)
    network = create_network(architecture, {**given, **more}, name)
    if weights is not None:
        load_into(network, weights, name)
    return network


def on_meta(architecture: str, arguments: Mapping[str, Any], name: object = "") -> Any:
    """The network without memory for its weights, to try arguments and to know its size.

    Args:
        architecture: timm's name of the network.
        arguments: for `timm.create_model`.
        name: where they stand, for messages; nothing lets timm's own errors through.

    Raises:
        InputError: timm has no such network, or it is too large; with a name, also one that timm can't build.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = create_network(architecture, arguments, name)
    size = sum(tensor.numel() for tensors in (network.parameters(), network.buffers()) for tensor in tensors)
    if size > LARGEST_NETWORK:
        raise InputError(
            f"{name or architecture}: a network of {size:.2g} weights, more than the {LARGEST_NETWORK:.2g} that any "
            "has; give smaller sizes"
        )
    return network


def create_network(architecture: str, arguments: Mapping[str, Any], name: object = "") -> Any:
    """A network of timm's with random weights. What a file says goes through `network_of` instead.

    Args:
        architecture: timm's name of the network.
        arguments: for `timm.create_model`.
        name: where they stand, for messages; nothing lets timm's own errors through.

    Raises:
        InputError: timm has no such network, or the memory does not suffice; with a name, also one that timm can't
            build.
    """
    check_architecture(architecture, name or architecture)
    try:
        return timm.create_model(architecture, pretrained=False, **arguments)
    except BUILD_ERRORS as error:
        if is_lack_of_memory(error):
            raise InputError(
                f"{name or architecture}: not enough memory for the weights of this network; free some, or take a "
                "machine with more"
            ) from error
        if not name:
            raise
        raise InputError(
            f"{name}: timm can't build {architecture} with these arguments ({first_line(error)})"
        ) from error
