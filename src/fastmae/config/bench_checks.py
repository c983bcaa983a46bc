"""Checks of the options that several benchmarks share."""

from pathlib import Path

from fastmae.errors import InputError


def check_sizes(patch_size: int, middle_size: int, image_size: int | None = None) -> None:
    """Check that the middle image and the view consist of whole patches, and that the view fits into the middle image.

    Args:
        patch_size: side of a patch, in pixels.
        middle_size: side of the middle image, in pixels.
        image_size: side of a view, in pixels; None for a benchmark without views.

    Raises:
        InputError: they do not.
    """
    for option, side in (("--image-size", image_size), ("--middle-size", middle_size)):
        if side is not None and side % patch_size:
            nearest = patch_size * max(1, round(side / patch_size))
            raise InputError(f"{option} {side}: not a multiple of --patch-size {patch_size}; give {nearest}")
    if image_size is not None and image_size > middle_size:
        raise InputError(
            f"--image-size {image_size}: larger than --middle-size {middle_size}, from which views are cut"
        )


def check_out(out: Path | None) -> None:
    """Check before the measuring, which may take an hour, that the Markdown file can be written.

    Raises:
        InputError: the path is a folder, or its folder does not exist.
    """
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        reason = "is a folder" if out.is_dir() else "its folder does not exist"
        raise InputError(f"--out {out}: {reason}; give the path of a Markdown file")
