"""What a benchmark measures on: some of a source's images, and token stores of them, built by the code that `tokenize` uses."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fastmae.errors import InputError
from fastmae.images.image_list import ImageList, ListInfo, write_list
from fastmae.images.sources import Source
from fastmae.offline.fill import Loading, StoreImages, fill, sample_tokens
from fastmae.runtime.progress import Progress
from fastmae.teachers import Teacher
from fastmae.tokens import TokenStore
from fastmae.tokens.codec import Codec, code_layout, learns, load_codec, parse_codec
from fastmae.tokens.format import Part, StoreInfo, checksum, list_name
from fastmae.tokens.quantise import learn_from
from fastmae.tokens.writer import StoreWriter, begin_folder

SHARD_SIZE = 256
"""Images a shard, `tokenize`'s default."""


class Remembered:
    """A teacher that knows its answer to a batch that it has seen: stores that differ in their codec alone take it once."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.known: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `Teacher.forward`."""
        key = checksum(pixels.cpu().numpy().tobytes())
        if key not in self.known:
            self.known[key] = self.teacher(pixels).cpu()
        return self.known[key]


def listed(source: Source, folder: Path) -> ImageList:
    """All of a source's images.

    Raises:
        InputError: it has none.
    """
    file = folder / "all.list"
    if not write_list(source.entries(), file).images:
        raise InputError(
            f"{source.path}: no image in it; give a folder, a list, tar shards or a datasets folder with images"
        )
    return ImageList(file)


def evenly(images: ImageList | Sequence[bytes], count: int) -> list[bytes]:
    """`count` entries from all over a list; all of them where it has fewer."""
    if count >= len(images):
        return list(images)
    places = [number * len(images) // count for number in range(count)]
    return [images.slice(place, place + 1)[0] if isinstance(images, ImageList) else images[place] for place in places]


def store_info(
    teacher: Teacher,
    parts: Sequence[Part],
    middle_size: int,
    patch_size: int,
    codec: str,
    pixels: str,
    jpeg_quality: int,
) -> StoreInfo:
    """The description of a store, in all else as `tokenize` makes it by default."""
    return StoreInfo(
        teacher.describe(), teacher.token_dim, middle_size, patch_size, 3, "whole", codec, "approximate",
        pixels, jpeg_quality if pixels == "jpeg" else 0, SHARD_SIZE, tuple(parts),
    )  # fmt: skip


def part_of(source: Source, made: ListInfo) -> Part:
    """A list of images of a source, as a store describes it."""
    return Part(made.images, made.sha256, str(source.path), source.kind)


def begin_store(folder: Path, source: Source, entries: Iterable[bytes]) -> Part:
    """A folder for a store of these images."""
    begin_folder(folder)
    return part_of(source, write_list(entries, folder / list_name(0)))


def finished_store(
    folder: Path,
    info: StoreInfo,
    source: Source,
    teacher: Teacher | Remembered,
    loading: Loading,
    codec_images: int,
    seed: int,
) -> TokenStore:
    """Build a store in a folder that `begin_store` made."""
    writer = StoreWriter(folder, info)
    images = StoreImages.of_store(folder, info, {0: source})
    known = cast(Teacher, teacher)
    with Progress(f"build {info.codec}, {info.pixels}", "images", total=info.images) as progress:
        codec = _codec(info, images, known, loading, codec_images, seed)
        if learns(info.codec):
            writer.keep_codebooks(codec)
        fill(writer, codec, range(info.shards), images, known, loading, progress)
    writer.finish()
    return TokenStore(folder)


def codec_names(given: str) -> list[str]:
    """`--codecs`: names with commas between them.

    Raises:
        InputError: none, an unknown one, or one twice.
    """
    names = [name.strip() for name in given.split(",")]
    for name in names:
        parse_codec(name)
    if len(set(names)) < len(names):
        raise InputError(f"--codecs {given}: names one twice")
    return names


def check_fit(codecs: Sequence[str], teacher: Teacher) -> None:
    """Codecs that can hold this teacher's tokens.

    Raises:
        InputError: one that can't.
    """
    for name in codecs:
        code_layout(name, teacher.token_dim)


def check_patches(patch_size: int, **sides: int) -> None:
    """Sides that are made of whole patches.

    Raises:
        InputError: one that is not.
    """
    for name, side in sides.items():
        if patch_size < 1 or side < patch_size or side % patch_size:
            near = max(1, round(side / max(1, patch_size))) * max(1, patch_size)
            raise InputError(
                f"--{name.replace('_', '-')} {side}: not a multiple of --patch-size {patch_size}; take {near}"
            )


def _codec(info: StoreInfo, images: StoreImages, teacher: Teacher, loading: Loading, count: int, seed: int) -> Codec:
    if not learns(info.codec):
        return load_codec(info.codec, info.token_dim, {})
    with Progress(f"learn {info.codec}", "images", total=min(count, info.images), quiet=True) as shown:
        tokens, means = sample_tokens(images, teacher, loading, min(count, info.images), seed, shown)
    return learn_from(info.codec, tokens, means, seed)
