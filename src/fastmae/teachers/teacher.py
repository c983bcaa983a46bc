"""The frozen teacher: middle images in, patch features on the student's grid out (g of Eq. 1).

This file settles, for ViTs and CNNs alike, which part of the network is tapped, at what size it sees the images, and
how its features are brought to the student's grid. Where the weights come from is in `factory`.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.errors import InputError, first_line
from fastmae.runtime.fast_linear import with_fast_linear
from fastmae.teachers.network import TimmNetwork
from fastmae.teachers.precision import FULL_PRECISION, computing_in

RGB = (0, 1, 2)

MODEL_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What models raise when they are asked for something that they can't do."""


class Teacher(nn.Module):
    """A frozen network, tapped at one block or averaged over several.

    For a ViT the image is resized so that its patches match the student's one to one, and class and register tokens are
    dropped. A CNN sees the image at its training size or at the middle size, whichever is larger. A map that is coarser
    than the student's grid is interpolated.

    Args:
        spec: the teacher's name.
        model: a timm model with its weights, or any other `Network`. It is frozen, and computes in float32.
        middle_size: side of the middle images, in pixels.
        grid: patches along that side.
        block: the tapped block of a ViT or stage of a CNN, from 0, or negative from the end; None for the last.
        norm: 'final', 'layer', 'none' or 'auto' (see `TokenizeConfig.teacher_norm`).
        input_size: side of the network's input, in pixels; None chooses it as described above.
        last: number of blocks whose outputs are averaged, each after the norm; the last of them is `block`.
        weights_file: where the weights came from, for the store's description.
        channels: the channels of the middle images that the network takes as red, green and blue.

    Attributes:
        precision: what it computes in, a name of `precision`; 32-true until it is set.

    Raises:
        InputError: a model without features on a grid, or a block, norm or size that the model does not have.
    """

    mean: torch.Tensor
    std: torch.Tensor
    channel_numbers: torch.Tensor

    def __init__(
        self,
        spec: str,
        model: Any,
        middle_size: int,
        grid: int,
        block: int | None = None,
        norm: str = "auto",
        input_size: int | None = None,
        last: int = 1,
        weights_file: str | None = None,
        channels: Sequence[int] = RGB,
    ):
        super().__init__()
        self.weights_sha256 = _weights_digest(model)  # before another image size resamples position embeddings
        is_network = hasattr(model, "features") and hasattr(model, "set_image_size")
        with _model_errors_named(spec):
            self.network: Any = model if is_network else TimmNetwork(spec, model)
        with_fast_linear(self.network.eval().requires_grad_(False).float())
        self.spec, self.grid, self.weights_file, self.channels = spec, grid, weights_file, list(channels)
        self.kind, self.precision = self.network.kind, FULL_PRECISION
        if self.kind == "cnn":
            # 1.3 to 1.7 times as fast (efficientnet-lite0 on a CPU), and the layout for which tensor cores are built.
            self.network.to(memory_format=torch.channels_last)
        self.block, self.last = _block_number(spec, block, self.network.depth), last
        if not 1 <= last <= self.block + 1 or (last > 1 and self.kind == "cnn"):
            raise InputError(
                f"--teacher-last {last}: give 1 to {self.block + 1} of a ViT's blocks; a CNN's stages differ in width"
            )
        self.norm = _norm_kind(spec, norm, self.network, is_last=self.block == self.network.depth - 1)
        self.register_buffer("mean", torch.tensor(self.network.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.network.std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("channel_numbers", torch.tensor(self.channels), persistent=False)
        with _model_errors_named(spec):
            has_patches = self.network.patch_size > 0
            self.input_size = self._fit_patches(input_size) if has_patches else self._fit_cnn(input_size, middle_size)
            blank = torch.zeros(1, max(self.channels) + 1, middle_size, middle_size, dtype=torch.uint8)
            tokens = self.forward(blank)
        if not torch.isfinite(tokens).all():
            raise InputError(f"{spec}: its features of a black image are not finite; check its weights, mean and std")
        self.token_dim = tokens.shape[-1]

    @torch.no_grad()  # not inference_mode: with a live teacher, a loss keeps the result for its backward pass
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of whole middle images.

        Args:
            pixels: uint8 [B, K, S, S].

        Returns:
            float32 [B, grid, grid, C].
        """
        if self.channels != list(range(pixels.shape[1])):
            pixels = pixels.index_select(1, self.channel_numbers)
        images, size = pixels.float(), (self.input_size, self.input_size)
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        with computing_in(self.precision, pixels.device):
            features = self._tap((images.clamp(0, 255) / 255 - self.mean) / self.std).float()
        if features.shape[-1] != self.grid:
            features = F.interpolate(features, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return features.permute(0, 2, 3, 1).contiguous()

    def describe(self) -> dict[str, Any]:
        """What a store keeps of its teacher. `factory.teacher_of_store` loads the same teacher from it.

        The precision is there only if it is not 32-true, as in stores that were made before there was a choice.
        """
        precision = {} if self.precision == FULL_PRECISION else {"precision": self.precision}
        return {
            **precision,
            "spec": str(self.spec),  # of a given object, the name alone
            "kind": self.kind,
            "block": self.block,
            "last": self.last,
            "norm": self.norm,
            "input_size": self.input_size,
            "channels": self.channels,
            "weights_sha256": self.weights_sha256,
            "weights_file": self.weights_file,
        }

    def _tap(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images -> features [B, C, h, w] of the tapped blocks, after the chosen norm."""
        blocks = range(self.block - self.last + 1, self.block + 1)
        maps = self.network.features(images, blocks, self.norm == "final")
        if self.norm == "layer":
            maps = [F.layer_norm(m.movedim(1, -1), m.shape[1:2], eps=1e-6).movedim(-1, 1) for m in maps]
        return torch.stack(maps).float().mean(0) if self.last > 1 else maps[0]

    def _fit_patches(self, input_size: int | None) -> int:
        """Set the image size of a network with patches: the given one, or the one that gives it the student's grid."""
        patch_size = self.network.patch_size
        fitting = self.grid * patch_size
        if input_size is not None and input_size % patch_size:
            raise InputError(
                f"--teacher-size {input_size}: not a multiple of {self.spec}'s patch size {patch_size}; {fitting} "
                "gives the store's grid"
            )
        input_size = input_size or fitting
        self.network.set_image_size(input_size)
        return input_size

    def _fit_cnn(self, input_size: int | None, middle_size: int) -> int:
        """Set a CNN's image size: the given one, or the larger of its training size and the middle size.

        A smaller size is taken where that gives the student's grid already.
        """
        native_size = self.network.native_size
        if input_size is None:
            with torch.no_grad():
                stride = native_size // self._tap(torch.zeros(1, 3, native_size, native_size)).shape[-1]
            input_size = min(-(-max(native_size, middle_size) // stride), self.grid) * stride
        if input_size != native_size:
            self.network.set_image_size(input_size)
        return input_size


@contextlib.contextmanager
def _model_errors_named(spec: str) -> Iterator[None]:
    """Turn a model's error into one line with its name: the hub holds many models that can't be teachers."""
    try:
        yield
    except InputError:
        raise
    except MODEL_ERRORS as error:
        raise InputError(
            f"{spec}: can't be a teacher here ({first_line(error)}); take another, or another --teacher-size"
        ) from error


def _block_number(spec: str, block: int | None, depth: int) -> int:
    """The tapped block, counted from 0."""
    number = depth - 1 if block is None else block + depth if block < 0 else block
    if not 0 <= number < depth:
        raise InputError(f"--teacher-block {block}: {spec} has blocks 0 to {depth - 1} (or -{depth} to -1)")
    return number


def _norm_kind(spec: str, norm: str, network: Any, is_last: bool) -> str:
    """'final', 'layer' or 'none'; 'auto' depends on the network and on whether its last block is tapped."""
    if norm == "final" and not network.has_final_norm:
        raise InputError(f"--teacher-norm final: {spec} has no final norm over its patch features; take layer or none")
    if norm != "auto":
        return norm
    if network.kind == "cnn" or network.takes_features_as_they_are:
        return "none"
    return "final" if is_last and network.has_final_norm else "layer"


def _weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in sorted(state.items()):
        weights = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(weights.shape)} {weights.dtype}\n".encode())
        digest.update(weights.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
