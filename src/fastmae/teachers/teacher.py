"""The frozen teacher: middle images in, patch features on the student's grid out (g of Eq. 1).

Which part of the network is tapped, at what size it looks, and how a grid other than the student's is brought to it are
settled here, for ViTs and CNNs alike. Where the weights come from is `factory`'s matter.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.errors import InputError, first_line
from fastmae.runtime.fast_linear import with_fast_linear
from fastmae.teachers.network import TimmNetwork

RGB = (0, 1, 2)


class Teacher(nn.Module):
    """A frozen network, tapped at one block or over the last few.

    For a ViT the image is resized so that its patches are the student's, one to one, and class and register tokens are
    dropped. A CNN sees the image at its own training size or at the middle size, whichever is larger, and a map coarser
    than the student's grid is interpolated to it.

    Args:
        spec: the name it was asked for by.
        model: a timm model with its weights, or another library's as a `Network`.
        middle_size: side of the middle images, in pixels.
        grid: patches along that side.
        block: block of a ViT or stage of a CNN whose output is tapped, from 0, or negative from the end; None: the last.
        norm: 'final', 'layer', 'none' or 'auto' (as `TokenizeConfig.teacher_norm`).
        size: side in pixels at which the network looks; None: chosen as said above.
        last: how many blocks' outputs are averaged, each after the norm; the last of them is `block`.
        weights_file: where the weights came from, for the record.
        channels: of the middle images, those that the network takes as red, green and blue.

    Raises:
        InputError: a model that has no features on a grid, or a block, norm or size that it does not have.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        spec: str,
        model: Any,
        middle_size: int,
        grid: int,
        block: int | None = None,
        norm: str = "auto",
        size: int | None = None,
        last: int = 1,
        weights_file: str | None = None,
        channels: Sequence[int] = RGB,
    ):
        super().__init__()
        self.weights_sha256 = _weights_digest(model)  # before a change of size resamples position embeddings
        with _odd_models_named(spec):
            self.network: Any = (
                model if hasattr(model, "features") and hasattr(model, "look_at") else TimmNetwork(spec, model)
            )
        with_fast_linear(self.network.eval().requires_grad_(False))
        self.spec, self.grid, self.weights_file, self.channels = spec, grid, weights_file, list(channels)
        self.kind = self.network.kind
        if self.kind == "cnn":  # 1.3 to 1.7 times as fast here (efficientnet-lite0, CPU), and what tensor cores want
            self.network.to(memory_format=torch.channels_last)
        self.block, self.last = _block_number(spec, block, self.network.depth), last
        if not 1 <= last <= self.block + 1 or (last > 1 and self.kind == "cnn"):
            raise InputError(
                f"--teacher-last {last}: give 1 to {self.block + 1} of a ViT's blocks; a CNN's stages differ in width"
            )
        self.norm = _norm_kind(spec, norm, self.network, is_last=self.block == self.network.depth - 1)
        self.register_buffer("mean", _per_channel(self.network.mean), persistent=False)
        self.register_buffer("std", _per_channel(self.network.std), persistent=False)
        with _odd_models_named(spec):
            self.input_size = self._fit_vit(size) if self.kind == "vit" else self._fit_cnn(size, middle_size)
            self.token_dim = self.forward(
                torch.zeros(1, max(self.channels) + 1, middle_size, middle_size, dtype=torch.uint8)
            ).shape[-1]

    @torch.no_grad()  # not inference_mode: online, a loss keeps the result for its backward pass
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of whole middle images.

        Args:
            pixels: uint8 [B, K, S, S].

        Returns:
            float32 [B, grid, grid, C].
        """
        if self.channels != list(range(pixels.shape[1])):
            pixels = pixels[:, self.channels]
        images = F.interpolate(
            pixels.float(), size=(self.input_size, self.input_size), mode="bicubic", antialias=True, align_corners=False
        ) if pixels.shape[-1] != self.input_size else pixels.float()  # fmt: skip
        features = self._tap((images.clamp(0, 255) / 255 - self.mean) / self.std).float()
        if features.shape[-1] != self.grid:
            features = F.interpolate(features, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return features.permute(0, 2, 3, 1).contiguous()

    def describe(self) -> dict[str, Any]:
        """What a store keeps of it; `from_description` in `factory` makes the same teacher again."""
        return {
            "spec": self.spec,
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
        """Normalised images -> [B, C, h, w] of the tapped blocks, after the chosen norm."""
        blocks = range(self.block - self.last + 1, self.block + 1)
        maps = self.network.features(images, blocks, self.norm == "final")
        if self.norm == "layer":
            maps = [F.layer_norm(m.movedim(1, -1), m.shape[1:2], eps=1e-6).movedim(-1, 1) for m in maps]
        return torch.stack(maps).mean(0) if self.last > 1 else maps[0]

    def _fit_vit(self, size: int | None) -> int:
        """Resample the position embeddings so that the network's grid is the student's."""
        patch = self.network.patch
        fitting = self.grid * patch
        if size is not None and size % patch:
            raise InputError(
                f"--teacher-size {size}: not a multiple of {self.spec}'s patch size {patch}; {fitting} gives the store's grid"
            )
        size = size or fitting
        self.network.look_at(size)
        return size

    def _fit_cnn(self, size: int | None, middle_size: int) -> int:
        """Look at the training size or the middle size, the larger; at less where that gives the student's grid already."""
        native = self.network.native_size
        if size is None:
            with torch.no_grad():
                stride = native // self._tap(torch.zeros(1, 3, native, native)).shape[-1]
            size = min(-(-max(native, middle_size) // stride), self.grid) * stride
        if size != native:
            self.network.look_at(size)
        return size


@contextlib.contextmanager
def _odd_models_named(spec: str) -> Iterator[None]:
    """Hub and libraries hold hundreds of models: what one of them can't do comes out as a line with its name."""
    try:
        yield
    except InputError:
        raise
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(
            f"{spec}: can't be a teacher here ({first_line(error)}); take another, or another --teacher-size"
        ) from error


def _block_number(spec: str, block: int | None, depth: int) -> int:
    number = depth - 1 if block is None else block + depth if block < 0 else block
    if not 0 <= number < depth:
        raise InputError(f"--teacher-block {block}: {spec} has blocks 0 to {depth - 1} (or -{depth} to -1)")
    return number


def _norm_kind(spec: str, norm: str, network: Any, is_last: bool) -> str:
    if norm == "final" and not network.has_final_norm:
        raise InputError(f"--teacher-norm final: {spec} has no final norm over its patch features; take layer or none")
    if norm != "auto":
        return norm
    if network.kind == "cnn":
        return "none"
    return "final" if is_last and network.has_final_norm else "layer"


def _weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    state: Mapping[str, torch.Tensor] = model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _per_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)
