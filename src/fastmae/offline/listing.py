"""Which images enter a store: all of a source's images, or with `--add` those that the store does not hold yet."""

import contextlib
import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastmae.errors import InputError
from fastmae.images.image_list import ImageList, ListInfo, new_entries, write_list
from fastmae.images.sources import Source, open_source
from fastmae.runtime.durable import write_whole
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.tokens.format import (
    LISTS_FOLDER,
    STORE_FILE,
    Part,
    StoreInfo,
    list_name,
    read_store_info,
    written_shards,
)

log = logging.getLogger(__name__)
COUNTED_AT_ONCE = 100
"""Images that are listed between two looks at the clock."""


@dataclass(frozen=True)
class ListedImages:
    """The images that a command was given.

    Attributes:
        source: where they are.
        file: their image list, a temporary file.
        info: number of images in the list, and its digest.
    """

    source: Source
    file: Path
    info: ListInfo

    @property
    def part(self) -> Part:
        """Description of these images as a part of a store."""
        return Part(self.info.images, self.info.sha256, str(self.source.path), self.source.kind)


@contextlib.contextmanager
def listed_images(images: Path, add: bool, folder: Path) -> Iterator[ListedImages]:
    """List the images of a source, for as long as the context lasts.

    Args:
        images: folder, list, tar shards or saved dataset.
        add: leave out the images that the store holds already.
        folder: the store; read only with `add`.

    Raises:
        InputError: no images, or no store to add to.
    """
    source = open_source(images)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as temporary:
        list_file, counter = Path(temporary) / "images.list", itertools.count()
        with Progress("list", "images", minor=True) as progress:
            entries = (entry for entry, _ in zip(_shown(source.entries(), progress), counter, strict=False))
            info = _write_part_list(entries, _lists_to_compare(folder, source) if add else [], list_file)
        if info.repeated:
            log.info(
                f"{images}: some names are given more than once; of each, the last image counts, "
                f"and the others are left out: {info.repeated}"
            )
        if add:
            known = next(counter) - info.images - info.repeated
            log.info(f"{images}: {counted(info.images, 'new image')}; {known} are in the store already, by their names")
        elif not info.images:
            raise InputError(
                f"{images}: no image in it; give a folder, a list, tar shards or a datasets folder with images"
            )
        yield ListedImages(source, list_file, info)


def _shown(entries: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    """The entries, counted: some at a time, since there may be millions."""
    for number, entry in enumerate(entries, 1):
        yield entry
        if number % COUNTED_AT_ONCE == 0:
            progress.advance(COUNTED_AT_ONCE)


def _write_part_list(entries: Iterable[bytes], earlier: Sequence[ImageList], file: Path) -> ListInfo:
    """Write the list of a part: the entries whose keys are in none of the earlier parts' lists."""
    return write_list(new_entries(entries, earlier, file.parent) if earlier else entries, file)


def _lists_to_compare(folder: Path, source: Source) -> list[ImageList]:
    """The store's lists that `--add` leaves out.

    These are all lists, except that of a part which an interrupted `--add` of the same source began: its images are
    to be listed once more, so that the call continues it.
    """
    if not (folder / STORE_FILE).exists():
        raise InputError(f"{folder}: no finished store to add to; leave --add out to make one")
    info = read_store_info(folder)
    num_lists = len(info.parts)
    if num_lists > 1 and info.parts[-1].source == str(source.path) and _last_part_is_unfinished(folder, info):
        num_lists -= 1
    return [ImageList(folder / list_name(part)) for part in range(num_lists)]


def _last_part_is_unfinished(folder: Path, info: StoreInfo) -> bool:
    last = len(info.parts) - 1
    shards_of_others = replace(info, parts=info.parts[:last]).shards
    written = sum(shards_of_others <= shard < info.shards for shard in written_shards(folder))
    return written < info.shards - shards_of_others


def keep_list(list_file: Path, folder: Path, part: int) -> None:
    """Copy the image list of a part into the store, whole or not at all."""
    (folder / LISTS_FOLDER).mkdir(exist_ok=True)
    write_whole(folder / list_name(part), lambda temporary: shutil.copyfile(list_file, temporary))


def check_lists(folder: Path, info: StoreInfo) -> None:
    """Check the store's image lists against store.json.

    Raises:
        InputError: a damaged list.
    """
    for number, part in enumerate(info.parts):
        file = folder / list_name(number)
        images = ImageList(file)
        if len(images) != part.images or images.sha256() != part.images_sha256:
            raise InputError(f"{file}: damaged; `fastmae verify {folder} --repair` makes it again")


def restore_list(folder: Path, info: StoreInfo, part: int) -> None:
    """List the images of a part again, from the source that the store names.

    Raises:
        InputError: the source is gone, or holds other images than when the part was made.
    """
    expected = info.parts[part]
    earlier = [ImageList(folder / list_name(number)) for number in range(part)]
    with tempfile.TemporaryDirectory(prefix="fastmae-") as temporary:
        list_file = Path(temporary) / "images.list"
        with Progress("list", "images", minor=True) as progress:
            entries = _shown(open_source(Path(expected.source)).entries(), progress)
            listed = _write_part_list(entries, earlier, list_file)
        if (listed.images, listed.sha256) != (expected.images, expected.images_sha256):
            raise InputError(
                f"{folder / list_name(part)}: can't be made again, since {expected.source} holds other images by now; "
                "bring them or the file back"
            )
        keep_list(list_file, folder, part)


def sources_of(listed: ListedImages, info: StoreInfo, shards: Iterable[int]) -> dict[int, Source]:
    """The source of each part to which the shards belong, by the part's number.

    A store with one part takes the given source even if the images have moved. Of several parts, those from elsewhere
    are read from the place that the store names.
    """
    sources: dict[int, Source] = {}
    for part in sorted({info.part_of(shard)[0] for shard in shards}):
        path = info.parts[part].source
        is_given = len(info.parts) == 1 or path == str(listed.source.path)
        sources[part] = listed.source if is_given else open_source(Path(path))
    return sources
