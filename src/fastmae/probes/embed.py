"""One vector an image from a frozen network, for kNN: decoding in workers, the forward here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastmae.errors import InputError
from fastmae.images.decode import UndecodableError
from fastmae.images.middle import resized_pixels
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, normalise
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import guarded, heed_only_the_parent
from fastmae.student.encoder import Encoder
from fastmae.teachers import Teacher

Embed = Callable[[torch.Tensor], torch.Tensor]
"""uint8 [B, K, S, S] -> float32 [B, D]."""
Read = Callable[[torch.Tensor], torch.Tensor]
"""float32 [B, K, S, S], normalised -> float32 [B, D]."""


class WholeImages(Dataset[torch.Tensor]):
    """Files -> whole pictures resized as the middle image is, uint8 [K, S, S]."""

    def __init__(self, paths: list[Path], size: int, resize: str, channels: int):
        self.paths, self.size, self.resize, self.channels = paths, size, resize, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> torch.Tensor:
        path = self.paths[place]
        try:
            with path.open("rb") as file:
                return resized_pixels(file, path.name, self.size, self.resize, self.channels)[0]
        except UndecodableError as error:
            raise InputError(f"{path}: {error}; remove it from the data") from error


def embed_with_encoder(
    encoder: Encoder,
    pool: str,
    block: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Embed:
    """Features of a timm ViT.

    Args:
        encoder: in evaluation mode.
        pool: 'mean' of the patch tokens, or 'class' for the class token.
        block: whose output; None: the last. The final norm is applied in both cases.
        mean: by which its images are normalised, for each colour.
        std: the same.

    Raises:
        InputError: no class token to take, or no such block.
    """
    read = features_of(encoder, pool, block)
    return lambda pixels: read(normalise(pixels, mean, std))


def features_of(encoder: Encoder, pool: str, block: int | None = None) -> Read:
    """Normalised images [B, K, S, S] -> a ViT's features [B, D]; the arguments, and what is raised, are those of `embed_with_encoder`."""
    check_pool(encoder, pool)
    tokens = tokens_of(encoder, block)
    return lambda images: pooled(encoder, *tokens(images), pool)


def check_pool(encoder: Encoder, pool: str) -> None:
    """Whether an encoder has what is to be its features.

    Raises:
        InputError: no class token to take.
    """
    if pool == "class" and getattr(encoder, "cls_token", None) is None:
        raise InputError("--pool class: this encoder has no class token; take --pool mean")


def pooled(encoder: Encoder, patches: torch.Tensor, prefix: torch.Tensor, pool: str) -> torch.Tensor:
    """Features [B, D]: 'mean' of the patch tokens [B, N, D], or 'class' for the first of the prefix tokens [B, P, D].

    A fine-tuned encoder's norm stands behind the mean, and is part of it.
    """
    return encoder.fc_norm(patches.mean(1)) if pool == "mean" else prefix[:, 0]


def tokens_of(
    encoder: Encoder, block: int | None = None
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Normalised images [B, K, S, S] -> a ViT's patch tokens [B, N, D] and prefix tokens [B, P, D] after a block and the final norm.

    Raises:
        InputError: no such block.
    """
    blocks = len(encoder.blocks)
    if block is not None and not -blocks <= block < blocks:
        raise InputError(f"--block {block}: this encoder has blocks 0 to {blocks - 1}")
    index = blocks - 1 if block is None else block % blocks

    def read(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return encoder.forward_intermediates(
            images,
            indices=[index],
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
            stop_early=True,
        )[0]

    return read


def embed_with_teacher(teacher: Teacher) -> Embed:
    """Mean of a teacher's patch features."""
    return lambda pixels: teacher(pixels).mean((1, 2))


def embed_files(
    paths: list[Path],
    embed: Embed,
    size: int,
    resize: str,
    device: torch.device,
    batch_size: int,
    workers: int,
    what: str,
    channels: int = 3,
) -> torch.Tensor:
    """Features of image files, float32 [len(paths), D], on the CPU.

    Args:
        paths: of the images.
        embed: from one of the above.
        size: side at which they are given to it, in pixels.
        resize: a key of `RESIZE`.
        device: of the network.
        batch_size: images a forward.
        workers: decoding processes.
        what: first word of the progress line.
        channels: to which the files are decoded.

    Raises:
        InputError: a file that can't be decoded.
    """
    return embed_pictures(
        WholeImages(paths, size, resize, channels), len(paths), embed, device, batch_size, workers, what
    )


@torch.no_grad()  # not inference_mode: a probe's loss keeps features for its backward pass
def embed_pictures(
    pictures: Dataset[Any],
    count: int,
    embed: Embed | Read,
    device: torch.device,
    batch_size: int,
    workers: int,
    what: str,
    quiet: bool = False,
) -> torch.Tensor:
    """Features of a data set's pictures, float32 [count, D], on the CPU.

    Args:
        pictures: gives what `embed` takes, for one picture; or that and more, which is left aside.
        count: of them.
        embed: on a batch.
        device: of the network.
        batch_size: images a forward.
        workers: decoding processes.
        what: first word of the progress line.
        quiet: without it.
    """
    pinned = device.type == "cuda"
    loader = DataLoader(
        pictures, batch_size, num_workers=workers, pin_memory=pinned, worker_init_fn=heed_only_the_parent
    )
    features = []
    with Progress(what, "images", total=count, quiet=quiet) as progress:
        for batch in guarded(loader):
            given = batch[0] if isinstance(batch, list | tuple) else batch
            features.append(embed(given.to(device, non_blocking=True)).float().cpu())
            progress.advance(len(given))
    return torch.cat(features)
