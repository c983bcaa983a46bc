"""The images that a benchmark measures on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmae.errors import InputError
from fastmae.images.entries import entry_of
from fastmae.images.image_list import ImageList, write_list
from fastmae.images.sources import Source, labelled_split
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k, for the disk space that its store would take."""


def list_images(source: Source, folder: Path) -> ImageList:
    """List all images of a source.

    Args:
        source: folder, list, tar shards or datasets folder.
        folder: where the list is written.

    Raises:
        InputError: the source has no image.
    """
    file = folder / "all.list"
    if not write_list(source.entries(), file).images:
        raise InputError(
            f"{source.path}: no image in it; give a folder, a list, tar shards or a datasets folder with images"
        )
    return ImageList(file)


def evenly_spaced(images: ImageList | Sequence[bytes], count: int) -> list[bytes]:
    """Take `count` entries at equal distances from a list, or all of them if the list is shorter."""
    if count >= len(images):
        return list(images)
    indices = [number * len(images) // count for number in range(count)]
    return [images.slice(index, index + 1)[0] if isinstance(images, ImageList) else images[index] for index in indices]


@dataclass(frozen=True)
class Split:
    """The images of `bench store`.

    Attributes:
        learning: entries on which codecs learn; with labels, those of train/.
        held_out: entries on which distortion is measured; with labels, those of val/.
        why_unlabelled: why the images have no labels; empty if they have.
    """

    learning: list[bytes]
    held_out: list[bytes]
    why_unlabelled: str

    @property
    def labelled(self) -> bool:
        """Whether the images have labels, so that k-NN accuracy can be measured."""
        return not self.why_unlabelled


def split_images(source: Source, limit: int, codec_images: int, folder: Path) -> Split:
    """Divide images into those that codecs learn on and those that are held out.

    With labels these are train/ and val/. Without labels at most every second image is for learning.

    Args:
        source: the images.
        limit: number of images to take, 0 for all.
        codec_images: number of images that codecs learn on at most, if there are no labels.
        folder: where the list of all images is written.

    Raises:
        InputError: one of the two groups would be empty.
    """
    with Progress("list", minor=True):
        labelled, why_unlabelled = _labelled_entries(source)
        images: ImageList | list[bytes] = labelled or list_images(source, folder)
    chosen = evenly_spaced(images, limit or len(images))
    if labelled:
        learning = [entry for entry in chosen if entry.startswith(b"train/")]
        held_out = [entry for entry in chosen if entry.startswith(b"val/")]
    else:
        learning = evenly_spaced(chosen, min(codec_images, len(chosen) // 2))
        taken = set(learning)
        held_out = [entry for entry in chosen if entry not in taken]
    if not (learning and held_out):
        raise InputError(
            f"{source.path}: {counted(len(chosen), 'image')}: too few to learn on some and measure others; use more"
        )
    return Split(learning, held_out, why_unlabelled)


def _labelled_entries(source: Source) -> tuple[list[bytes], str]:
    """Entries of train/<class>/* and val/<class>/*. Without labels: no entries, and the reason."""
    if source.kind != "folder":
        return [], "only folders train/<class>/ and val/<class>/ have them"
    try:
        paths = [path for split in ("train", "val") for path in labelled_split(source.path, split)[0]]
    except InputError as error:
        return [], str(error)
    return [entry_of(source.path, path.relative_to(source.path).as_posix()) for path in paths], ""
