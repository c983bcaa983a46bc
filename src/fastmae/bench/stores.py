"""Token stores for a benchmark, built by the code that `tokenize` uses and with its defaults."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch

from fastmae.config import TokenizeConfig
from fastmae.images.image_list import ListInfo, write_list
from fastmae.images.sources import Source
from fastmae.offline.fill import build_shards
from fastmae.offline.middle_images import LoaderOptions, MiddleImages
from fastmae.offline.sample import sample_tokens
from fastmae.runtime.progress import Progress
from fastmae.teachers import Teacher
from fastmae.tokens import TokenStore
from fastmae.tokens.codec import Codec, learns, load_codec
from fastmae.tokens.format import Part, StoreInfo, checksum, list_name
from fastmae.tokens.learn import learn_from
from fastmae.tokens.writer import StoreWriter, begin_folder


class CachedTeacher:
    """A teacher that computes each batch once, for stores of the same images that differ in their codec only.

    Tokens stay in memory, so this is for a benchmark's sample.

    Args:
        teacher: computes the tokens and has all other attributes.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.tokens: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """`Teacher.forward`; between calls the tokens lie on the CPU."""
        key = checksum(pixels.cpu().numpy().tobytes())
        if key not in self.tokens:
            self.tokens[key] = self.teacher(pixels).cpu()
        return self.tokens[key].to(pixels.device)


def store_info(
    teacher: Teacher,
    parts: Sequence[Part],
    middle_size: int,
    patch_size: int,
    codec: str,
    pixels: Literal["jpeg", "raw"],
    quality: int,
) -> StoreInfo:
    """Describe a store of RGB images. What the arguments do not say is `tokenize`'s default.

    Args:
        teacher: whose tokens it holds.
        parts: its image lists.
        middle_size: side of the middle image, in pixels.
        patch_size: side of a patch, in pixels.
        codec: name of the tokens' codec.
        pixels: 'jpeg' or 'raw'.
        quality: JPEG quality, unused for raw pixels.
    """
    return StoreInfo(
        teacher=teacher.describe(),
        token_dim=teacher.token_dim,
        middle_size=middle_size,
        patch_size=patch_size,
        channels=3,
        resize=TokenizeConfig.resize,
        codec=codec,
        flips=TokenizeConfig.flips,
        pixels=pixels,
        jpeg_quality=quality if pixels == "jpeg" else 0,
        shard_size=TokenizeConfig.shard_size,
        parts=tuple(parts),
    )


def part_of(source: Source, images: ListInfo) -> Part:
    """Describe a list of a source's images as a part of a store."""
    return Part(images.images, images.sha256, str(source.path), source.kind)


def begin_store(folder: Path, source: Source, entries: Iterable[bytes]) -> Part:
    """Create the folder and the image list of a store."""
    begin_folder(folder)
    return part_of(source, write_list(entries, folder / list_name(0)))


def build_store(
    folder: Path,
    info: StoreInfo,
    source: Source,
    teacher: Teacher | CachedTeacher,
    loading: LoaderOptions,
    codec_images: int,
    seed: int,
) -> TokenStore:
    """Build and open a store in a folder that `begin_store` created.

    Args:
        folder: the store.
        info: its description.
        source: its images.
        teacher: computes the tokens, on its device.
        loading: how images are loaded and fed to the teacher.
        codec_images: number of images that the codec learns from at most.
        seed: seed of the codec's learning.
    """
    writer = StoreWriter(folder, info)
    images = MiddleImages.of_store(folder, info, {0: source})
    any_teacher = cast(Teacher, teacher)
    with Progress(f"build {info.codec}, {info.pixels}", "images", total=info.images) as progress:
        codec = _learn_codec(info, images, any_teacher, loading, min(codec_images, info.images), seed)
        if learns(info.codec):
            writer.keep_codebooks(codec)
        build_shards(writer, codec, range(info.shards), images, any_teacher, loading, progress)
    writer.finish()
    return TokenStore(folder)


def _learn_codec(
    info: StoreInfo, images: MiddleImages, teacher: Teacher, loading: LoaderOptions, count: int, seed: int
) -> Codec:
    if not learns(info.codec):
        return load_codec(info.codec, info.token_dim, {})
    with Progress(f"sample tokens for {info.codec}", "images", total=count) as progress:
        sample = sample_tokens(images, teacher, loading, count, seed, progress)
    return learn_from(info.codec, sample.tokens, sample.means, seed)
