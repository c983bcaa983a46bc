"""Frozen features: one vector per image. Images are decoded in worker processes; the forward passes run here."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastmae.config import TokenizeConfig
from fastmae.errors import InputError
from fastmae.images.middle import resized_pixels
from fastmae.images.reading import read_or_refuse
from fastmae.images.value_range import AUTO, FILE
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, PixelScale
from fastmae.probes.labelled import LabelledFolder
from fastmae.runtime.arithmetic import float32_products
from fastmae.runtime.device import free_bytes
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import batches
from fastmae.student.encoder import Encoder, is_plain_vit
from fastmae.student.feature_map import last_map, stage_maps
from fastmae.teachers import Teacher

Embed = Callable[[torch.Tensor], torch.Tensor]
"""uint8 [B, K, S, S] -> float32 [B, D]."""
EmbedNormalised = Callable[[torch.Tensor], torch.Tensor]
"""float32 [B, K, S, S], normalised -> float32 [B, D]."""

CHECKED_SIZE, CHECKED_BATCH_SIZE = 32, 64
FEATURES_SHARE = 0.5
"""Share of the device's free memory that the features of a data set may take."""


class WholeImages(Dataset[torch.Tensor]):
    """Image files as whole pictures, resized as the middle image is: uint8 [K, S, S].

    Args:
        paths: the files.
        size: S, in pixels.
        resize: a key of `images.middle.RESIZE`.
        channels: K.
        value_range: how values of more than 8 bits become 8 bits.
    """

    def __init__(self, paths: list[Path], size: int, resize: str, channels: int, value_range: str = AUTO):
        self.paths, self.size, self.resize, self.channels = paths, size, resize, channels
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        return read_or_refuse(
            path,
            lambda file: resized_pixels(file, path.name, self.size, self.resize, self.channels, self.value_range)[0],
            "remove it from the data",
        )


def check_decodable(data: LabelledFolder, options: TokenizeConfig, name: str) -> None:
    """Decode the images of train/ and val/ once, so that a damaged one is named before anything is made of them.

    Args:
        data: the images.
        options: how they will be tokenised.
        name: of the data set, for the progress line.

    Raises:
        InputError: names the first one that can't be decoded.
    """
    value_range = AUTO if options.value_range == AUTO else FILE  # any range but auto takes the same files
    images = WholeImages([*data.train, *data.val], CHECKED_SIZE, options.resize, options.channels, value_range)
    cpu, label = torch.device("cpu"), f"checking {name}"
    embed_images(images, lambda pixels: pixels[:, :1, 0, 0], cpu, CHECKED_BATCH_SIZE, options.workers, label)


def embed_with_encoder(
    encoder: Encoder,
    pool: str,
    block: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Embed:
    """A function that embeds images with a network of timm.

    Args:
        encoder: in evaluation mode.
        pool: 'mean' of the patch tokens (of the positions of a map), or 'class' for the class token.
        block: block (stage) whose output is used; None: the last. A ViT's final norm is always applied.
        mean: mean of the encoder's input, one value per channel (of values in [0, 1]).
        std: its standard deviation.

    Raises:
        InputError: the encoder has no class token, or no such block.
    """
    embed_normalised, pixel_scale = pooled_features(encoder, pool, block), PixelScale(mean, std)
    return lambda pixels: embed_normalised(pixel_scale(pixels))


def pooled_features(encoder: Encoder, pool: str, block: int | None = None) -> EmbedNormalised:
    """As `embed_with_encoder`, for images that are normalised already."""
    check_pool(encoder, pool)
    tokens = tokens_of(encoder, block)
    return lambda images: pooled(encoder, *tokens(images), pool)


def check_pool(encoder: Encoder, pool: str) -> None:
    """Check that the encoder has the token that `--pool` asks for.

    Raises:
        InputError: it has no class token, or none that a norm follows; or it is no plain ViT, of which only the map is
            used.
    """
    if pool == "class" and (not is_plain_vit(encoder) or getattr(encoder, "cls_token", None) is None):
        raise InputError("--pool class: this encoder has no class token; use --pool mean")
    if pool == "class" and not isinstance(encoder.fc_norm, nn.Identity):
        raise InputError("--pool class: this encoder normalises the mean of its patches alone; use --pool mean")


def pooled(encoder: Encoder, patches: torch.Tensor, prefix: torch.Tensor, pool: str) -> torch.Tensor:
    """One vector per image, [B, D].

    In a fine-tuned ViT, the norm comes after the mean and is applied here. The embedding of any other network is the
    mean of its last map alone: a norm or a layer that its classifier puts after the mean is not trained with the map.

    Args:
        encoder: the encoder of the tokens.
        patches: patch tokens [B, N, D].
        prefix: class and register tokens [B, P, D].
        pool: 'mean' of the patch tokens, or 'class' for the first prefix token.
    """
    if pool == "class":
        return prefix[:, 0]
    mean = patches.mean(1)
    return encoder.fc_norm(mean) if is_plain_vit(encoder) else mean


def tokens_of(
    encoder: Encoder, block: int | None = None
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A function from normalised images [B, K, S, S] to patch tokens [B, N, D] and prefix tokens [B, P, D].

    Args:
        encoder: a network of timm; one that is no plain ViT has a token for each position of its map, and no prefix.
        block: block (stage) whose output is used; None: the last. A ViT's final norm is always applied.

    Raises:
        InputError: no such block.
    """
    is_vit = is_plain_vit(encoder)
    depth, parts = (len(encoder.blocks), "blocks") if is_vit else (len(encoder.feature_info), "stages")
    if block is not None and not -depth <= block < depth:
        raise InputError(f"--block {block}: this encoder has {parts} 0 to {depth - 1}")
    index = depth - 1 if block is None else block % depth
    return partial(_block_tokens if is_vit else _stage_tokens, encoder, index)


def _block_tokens(encoder: Encoder, index: int, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A plain ViT's tokens after a block and the final norm."""
    return encoder.forward_intermediates(
        images,
        indices=[index],
        norm=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
        intermediates_only=True,
        stop_early=True,
    )[0]


def _stage_tokens(encoder: Encoder, index: int, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of the map of a stage, as tokens."""
    is_last = index == len(encoder.feature_info) - 1
    stage = last_map(encoder, images) if is_last else stage_maps(encoder, images)[index]
    tokens = stage.flatten(2).transpose(1, 2)
    return tokens, tokens[:, :0]


def embed_with_teacher(teacher: Teacher) -> Embed:
    """A function that embeds images by the mean of a teacher's patch features."""
    return lambda pixels: teacher(pixels).mean((1, 2))


@torch.no_grad()  # not inference_mode: a probe's loss keeps the features for its backward pass
def embed_images(
    images: Dataset[Any],
    embed: Embed | EmbedNormalised,
    device: torch.device,
    batch_size: int,
    workers: int,
    label: str,
    quiet: bool = False,
) -> torch.Tensor:
    """The features of a data set's images: float32 [n, D], on the device if there is room for them.

    On the device, no batch makes the host wait.

    Args:
        images: gives, for each index, what `embed` takes for one image; or a tuple that starts with it.
        embed: embeds a batch.
        device: device of the network.
        batch_size: images per forward pass.
        workers: decoding processes, as `--workers`.
        label: first word of the progress line.
        quiet: show no progress.

    Raises:
        InputError: a file that can't be decoded.
    """
    count, done = len(images), 0  # type: ignore[arg-type]
    features = torch.empty(0)
    # In float32 proper: the figures are then the same on any device.
    with float32_products(device, tf32=False), Progress(label, "images", total=count, quiet=quiet) as progress:
        for batch in batches(images, device, workers, batch_size=batch_size):
            pixels = batch[0] if isinstance(batch, list | tuple) else batch
            vectors = embed(pixels.to(device, non_blocking=True)).float()
            if not done:
                features = room_for(count, vectors)
            features[done : done + len(vectors)] = vectors
            done += len(vectors)
            progress.advance(len(vectors))
    return features


def room_for(count: int, vectors: torch.Tensor) -> torch.Tensor:
    """Memory for the features of `count` images, given those of the first batch: on their device, or on the CPU."""
    num_bytes = count * vectors[0].numel() * vectors.element_size()
    fits = num_bytes <= FEATURES_SHARE * free_bytes(vectors.device)
    return torch.empty(count, *vectors.shape[1:], device=vectors.device if fits else "cpu")
