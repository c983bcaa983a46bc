"""One vector an image from a frozen network, for kNN: decoding in workers, the forward here."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from fastmae.errors import InputError
from fastmae.images.decode import UndecodableError
from fastmae.images.middle import resized_pixels
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, normalise
from fastmae.loading import guarded, heed_only_the_parent
from fastmae.model import Encoder
from fastmae.progress import Progress
from fastmae.teachers import Teacher

Embed = Callable[[torch.Tensor], torch.Tensor]
"""uint8 [B, K, S, S] -> float32 [B, D]."""


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
        InputError: no class token to take.
    """
    if pool == "class" and getattr(encoder, "cls_token", None) is None:
        raise InputError("--pool class: this encoder has no class token; take --pool mean")
    blocks = len(encoder.blocks)
    if block is not None and not -blocks <= block < blocks:
        raise InputError(f"--block {block}: this encoder has blocks 0 to {blocks - 1}")

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        index = blocks - 1 if block is None else block % blocks
        patches, prefix = encoder.forward_intermediates(
            normalise(pixels, mean, std),
            indices=[index],
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
            stop_early=True,
        )[0]
        return patches.mean(1) if pool == "mean" else prefix[:, 0]

    return embed


def embed_with_teacher(teacher: Teacher) -> Embed:
    """Mean of a teacher's patch features."""
    return lambda pixels: teacher(pixels).mean((1, 2))


@torch.inference_mode()
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
    images = WholeImages(paths, size, resize, channels)
    pinned = device.type == "cuda"
    loader = DataLoader(images, batch_size, num_workers=workers, pin_memory=pinned, worker_init_fn=heed_only_the_parent)
    features = []
    with Progress(what, "images", total=len(paths)) as progress:
        for pixels in guarded(loader):
            features.append(embed(pixels.to(device, non_blocking=True)).float().cpu())
            progress.advance(len(pixels))
    return torch.cat(features)
