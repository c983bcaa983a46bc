"""A module of the user's own as a teacher: what it must have, and what it may return."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastmae.errors import InputError, is_out_of_memory
from fastmae.teachers.python_code import built_module, described, kind_of

USUAL_SIZE = 224
"""Side of the images in pixels where nothing else sets it, as in `knn`; rounded to whole patches."""
LARGEST_PATCH = 1024
MOST_BLOCKS = 1024
LARGEST_COLOUR = 4
"""Above any mean or std of values from 0 to 1; those of values to 255 lie above it."""
MOST_PREFIX_TOKENS = 64
"""Tokens beyond those of the patches that a message takes for class and register tokens."""
CONTRACT = (
    "set mean and std (three numbers each, for values from 0 to 1) and patch_size (in pixels) on the module; see "
    "docs/teachers.md"
)


class PythonNetwork(nn.Module):
    """A module of the user's own, as a `Network`.

    What the module returns is taken as it is: `--teacher-norm auto` adds no norm. Mean, std and patch size are buffers,
    so that the digest of the weights covers them.

    Args:
        spec: the teacher's name, for messages.
        module: maps normalised images [B, 3, S, S] to [B, C, g, g] or [B, g * g, C], where g is S / patch_size.
        file: the file of its code, where that is known, for messages.

    Raises:
        InputError: a module without the attributes that it needs, or with values that they can't have.
    """

    has_final_norm = False
    takes_features_as_they_are = True

    def __init__(self, spec: str, module: nn.Module, file: str | None = None):
        super().__init__()
        self.spec, self.module, self.file = spec, module, file
        self.mean, self.std = (_colours(spec, module, name) for name in ("mean", "std"))
        self.patch_size = self._whole_number("patch_size", None, LARGEST_PATCH)
        self.depth = self._whole_number("teacher_blocks", 1, MOST_BLOCKS)
        self.kind = getattr(module, "kind", "vit")
        if self.kind not in ("vit", "cnn"):
            raise InputError(f"{spec}: its kind is {self.kind!r}; set 'vit' or 'cnn', or leave it out")
        self.native_size = max(1, USUAL_SIZE // self.patch_size) * self.patch_size
        self.register_buffer("normalisation", torch.tensor([self.mean, self.std]))
        self.register_buffer("side_of_a_patch", torch.tensor(self.patch_size))

    def __deepcopy__(self, memo: dict[int, Any]) -> "PythonNetwork":
        """The network itself: no size is set in it, and not every module of a user can be copied."""
        return self

    def set_image_size(self, size: int) -> None:
        """Nothing to do: the module gets images of another size."""

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """See `Network`.

        Raises:
            InputError: the module fails, or returns something else than patch features.
        """
        try:
            output = self.module(images, list(blocks)) if self.depth > 1 else self.module(images)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"{self.spec}: fails on images {list(images.shape)} ({described(error, self.file)}); if it takes "
                "images of one size only, give that with --teacher-size"
            ) from error
        if self.depth == 1:
            return [self._map(output, images)]
        if not isinstance(output, list | tuple) or len(output) != len(blocks):
            raise InputError(
                f"{self.spec}: returns {kind_of(output)}; as it has teacher_blocks, return a list of the features of "
                f"each of the blocks that it is given, here {list(blocks)}"
            )
        return [self._map(part, images) for part in output]

    def _map(self, output: Any, images: torch.Tensor) -> torch.Tensor:
        """The module's features as [B, C, g, g]."""
        batch, grid = len(images), images.shape[-1] // self.patch_size
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            if output.dim() == 4 and len(output) == batch and output.shape[2:] == (grid, grid):
                return output
            if output.dim() == 3 and output.shape[:2] == (batch, grid**2):
                return output.transpose(1, 2).unflatten(2, (grid, grid))
        way_out = self._way_out(output, batch, grid)
        raise InputError(f"{self.spec}: returns {kind_of(output)} for images {list(images.shape)}; {way_out}")

    def _way_out(self, output: Any, batch: int, grid: int) -> str:
        """What to change in a module that returns something else."""
        wanted = f"[{batch}, C, {grid}, {grid}] or [{batch}, {grid**2}, C]"
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return f"return one tensor of floating-point numbers, {wanted}"
        shape = output.shape
        if len(shape) == 4 and shape[1:3] == (grid, grid):
            return f"return {wanted}: permute(0, 3, 1, 2) puts the channels in their place"
        more = shape[1] - grid**2 if len(shape) == 3 else 0
        if 0 < more <= MOST_PREFIX_TOKENS:
            return f"these are {grid**2} patches and {more} more: leave out class and register tokens, as [:, {more}:]"
        if len(shape) == 2:
            return f"that is one vector for an image; return those of its patches, {wanted}"
        return f"with patch_size {self.patch_size}, return {wanted}"

    def _whole_number(self, name: str, default: int | None, most: int) -> int:
        """An attribute; a pair of two equal numbers counts as one."""
        value = getattr(self.module, name, default)
        if value is None:
            raise InputError(f"{self.spec}: has no {name}; {CONTRACT}")
        number = value[0] if isinstance(value, list | tuple) and len({*value}) == 1 else value
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
            raise InputError(f"{self.spec}: its {name} is {value!r}; set one whole number, 1 to {most}")
        return number


def load_python(spec: str) -> nn.Module:
    """The network that the user's own code builds, on the CPU: a `PythonNetwork`, or timm's model if it builds that.

    Args:
        spec: as in `built_module`.

    Raises:
        InputError: as `built_module`, or the module can't be a teacher.
    """
    module, file = built_module(spec)
    module.cpu()  # where the first image goes through it
    return _as_timm(str(spec), module) if _is_timm(module) else PythonNetwork(str(spec), module, file)


def _is_timm(module: Any) -> bool:
    return hasattr(module, "forward_intermediates") and isinstance(getattr(module, "pretrained_cfg", None), dict)


def _as_timm(spec: str, model: Any) -> nn.Module:
    """timm's model, with the mean and std that the user has set on it."""
    own = {name: _colours(spec, model, name) for name in ("mean", "std") if hasattr(model, name)}
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    loaded: nn.Module = model
    return loaded


def _colours(spec: str, module: nn.Module, name: str) -> tuple[float, float, float]:
    """`mean` or `std`, which may be a tuple, a list, an array or a tensor of three numbers."""
    value = getattr(module, name, None)
    if value is None or callable(value):
        raise InputError(f"{spec}: has no {name}; {CONTRACT}")
    try:
        red, green, blue = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{spec}: its {name} is not three numbers; {CONTRACT}") from error
    colours = (red, green, blue)
    if not all(map(math.isfinite, colours)) or max(colours) > LARGEST_COLOUR or (name == "std" and min(colours) <= 0):
        raise InputError(f"{spec}: its {name} {colours} can't be that of values from 0 to 1; {CONTRACT}")
    return colours
