"""What a run's description must hold: run.json, and the same in its checkpoints.

The description stays the plain JSON that it is; here it is checked that it can be used as such. Options are checked
against the types and ranges of the command's own options.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from fastmae.config.commands import COMMANDS
from fastmae.config.resolve import converted, flag
from fastmae.errors import InputError
from fastmae.images.value_range import AUTO, bounds_of
from fastmae.outside.documents import checked
from fastmae.teachers.factory import StoredTeacher

Description = dict[str, Any]
WAY_OUT = "it was damaged or changed by hand; take the run's other checkpoint or an export"

Side = Annotated[int, msgspec.Meta(ge=1, le=16384)]
Channels = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Resize = Literal["whole", "center-crop"]
NEEDED_OPTIONS = (
    *("encoder", "image_size", "encoder_width", "encoder_depth", "encoder_heads", "target", "epochs"),
    *("mask_ratio", "decoder_depth", "decoder_class_token"),
)
"""Options without which a pre-training run's encoder can't be built, or its history told."""
OF_THE_DECODER = ("decoder_width", "decoder_heads", "decoder_class_token", "loss_on", "fusion")


def with_effect(options: dict[str, Any]) -> dict[str, Any]:
    """A pre-training run's options, without those of a decoder that it does not have."""
    if options["decoder_depth"]:
        return options
    return {name: value for name, value in options.items() if name not in OF_THE_DECODER}


class DescribedEncoder(msgspec.Struct):
    """The encoder of a run on labels. Its architecture and arguments are checked when it is built."""

    architecture: str
    arguments: dict[str, Any]
    prefix: str
    image_size: Side
    patch_size: Side
    channels: Channels
    mean: list[float]
    std: list[float]
    resize: Resize
    source: str
    weights_sha256: str
    value_range: str = AUTO

    def __post_init__(self) -> None:
        bounds_of(self.value_range)
        check_normalisation(self.mean, self.std, self.channels)


class DescribedStore(msgspec.Struct):
    """The store of a pre-training run."""

    images: Annotated[int, msgspec.Meta(ge=1)]
    images_sha256: str
    middle_sizes: Annotated[list[Side], msgspec.Meta(min_length=1, max_length=1024)]
    patch_size: Side
    channels: Channels
    codec: str
    flips: str
    pixels: str
    normalisation: Annotated[list[list[float]], msgspec.Meta(min_length=2, max_length=2)]
    resize: Resize
    teachers: Annotated[list[StoredTeacher], msgspec.Meta(min_length=1, max_length=1024)]
    value_range: str = AUTO

    def __post_init__(self) -> None:
        bounds_of(self.value_range)
        mean, std = self.normalisation
        check_normalisation(mean, std, self.channels)


class DescribedRun(msgspec.Struct):
    """A run of any command."""

    task: str | None = None
    images: Annotated[int, msgspec.Meta(ge=0)] | None = None
    options: dict[str, Any] = {}
    target_dims: list[Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]] = []
    store: DescribedStore | None = None
    encoder: DescribedEncoder | None = None


def check_description(value: Any, name: object) -> Description:
    """A run's description, after a check of what all commands rely on.

    Args:
        value: as it was read.
        name: of the file, for messages.

    Raises:
        InputError: it is no description of a run.
    """
    run = checked(value, DescribedRun, name=f"{name}: the run's description", way_out=WAY_OUT)
    missing = [option for option in NEEDED_OPTIONS if run.store is not None and option not in run.options]
    if missing:
        raise InputError(f"{name}: the run's description lacks the option {flag(missing[0])}; {WAY_OUT}")
    if run.store is None and run.task is None:
        raise InputError(f"{name}: the run's description names no task; {WAY_OUT}")
    command = COMMANDS.get(run.task or "pretrain")
    hints = {} if command is None else get_type_hints(command.kind, include_extras=True)
    with naming(name):
        for option, given in run.options.items():
            if option in hints:
                converted(hints[option], given, flag(option))
    description: Description = value
    return description


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Put a file's name before a message that speaks of the options in it."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(str(name)) else f"{name}: {message}") from error


def check_normalisation(mean: list[float], std: list[float], channels: int) -> None:
    """Check the means and deviations by which images are normalised, one of each per channel.

    Raises:
        ValueError: too few or many, or some that can't be used.
    """
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean and std of {len(mean)} and {len(std)} channels, not {channels}")
    if not all(abs(value) < 1e6 for value in (*mean, *std)) or not all(value > 0 for value in std):
        raise ValueError("a mean or std that can't be used")
