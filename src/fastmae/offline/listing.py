"""Which images come into a store: those of a source, or with `--add` those of it that the store does not hold yet."""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastmae.errors import InputError
from fastmae.images.image_list import ImageList, ListInfo, new_entries, write_list
from fastmae.images.sources import Source, open_source
from fastmae.runtime.durable import write_whole
from fastmae.tokens.format import STORE_FILE, Part, StoreInfo, list_name, read_store_info, shard_path


@dataclass(frozen=True)
class ListedImages:
    """The images that were asked for: where they come from, and their list, in a file that goes away with the command."""

    source: Source
    file: Path
    info: ListInfo

    @property
    def part(self) -> Part:
        """As a store describes it."""
        return Part(self.info.images, self.info.sha256, str(self.source.path), self.source.kind)


@contextlib.contextmanager
def listed_images(images: Path, add: bool, folder: Path) -> Iterator[ListedImages]:
    """List the images; with `--add`, those that the finished store does not hold yet.

    Raises:
        InputError: no images, or nothing to add to.
    """
    source = open_source(images)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as aside:
        file, seen = Path(aside) / "images.list", itertools.count()
        entries: Iterator[bytes] = (entry for entry, _ in zip(source.entries(), seen, strict=False))
        if add:
            entries = new_entries(entries, _lists_of(folder, source), Path(aside))
        info = write_list(entries, file)
        if not info.images and not add:
            raise InputError(
                f"{images}: no image in it; give a folder, a list, tar shards or a datasets folder with images"
            )
        if add:
            print(
                f"{images}: {info.images} new images; {next(seen) - info.images} are in the store already, by their names"
            )
        yield ListedImages(source, file, info)


def _lists_of(folder: Path, source: Source) -> list[ImageList]:
    """The lists against which `--add` compares: all, but for a part that an interrupted `--add` of the same images has begun."""
    if not (folder / STORE_FILE).exists():
        raise InputError(f"{folder}: no finished store to add to; leave --add out to make one")
    info = read_store_info(folder)
    compared = len(info.parts)
    if compared > 1 and info.parts[-1].source == str(source.path) and _last_part_is_missing_shards(folder, info):
        compared -= 1
    return [ImageList(folder / list_name(part)) for part in range(compared)]


def _last_part_is_missing_shards(folder: Path, info: StoreInfo) -> bool:
    last = len(info.parts) - 1
    return any(
        info.part_of(shard)[0] == last and not shard_path(folder, shard).exists() for shard in range(info.shards)
    )


def keep_list(listed: ListedImages, file: Path) -> None:
    """Put the list into the store."""
    write_whole(file, lambda aside: shutil.copyfile(listed.file, aside))


def check_lists(folder: Path, info: StoreInfo) -> None:
    """The store's lists are those that store.json describes.

    Raises:
        InputError: one is damaged.
    """
    for number, part in enumerate(info.parts):
        file = folder / list_name(number)
        if ImageList(file).sha256() != part.images_sha256:
            raise InputError(f"{file}: damaged; `fastmae verify {folder} --repair` makes it again")


def sources_of(listed: ListedImages, info: StoreInfo, missing: list[int]) -> dict[int, Source]:
    """Of each part with shards to make: the one given, where it is that one, or the only one; else from where the store says."""
    here, found = str(listed.source.path), {}
    for number in sorted({info.part_of(shard)[0] for shard in missing}):
        source = info.parts[number].source
        found[number] = listed.source if source == here or len(info.parts) == 1 else open_source(Path(source))
    return found
