"""Whether a batch of images can fit into the machine's memory at all, before one is decoded."""

import os

from fastmae.errors import InputError


def check_batch(images: int, channels: int, side: int) -> None:
    """Refuse a batch whose pixels alone, one byte each, are more than all memory of the machine.

    Args:
        images: that one process holds at once.
        channels: of an image.
        side: of an image, in pixels.

    Raises:
        InputError: names the options.
    """
    needed, memory = images * channels * side**2, memory_of_machine()
    if needed > memory:
        raise InputError(
            f"--batch-size: {images:,} images of {side} x {side} pixels are {needed / 1e9:,.0f} GB, and this machine "
            f"has {memory / 1e9:,.0f} GB of memory; give a smaller one, or smaller images"
        )


def memory_of_machine() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
