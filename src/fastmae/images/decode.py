"""One open image file -> upright 8-bit RGB, grey or n channels, or a reason why not. Pillow decodes; nothing here resizes.

.npy arrays are read here: the header by NumPy's own functions, the values only if the file holds as many as it declares.
"""

import errno
import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

MAX_PIXELS = 1 << 27
"""134 megapixels, 400 MB as RGB: a larger image is refused unread (a few bytes can declare gigabytes)."""

BY_A_BAD_FILE = {None, errno.EINVAL, errno.EOVERFLOW}
"""Of an OSError: a codec's own (no number), and what the system answers when a header sends the reader to an impossible place."""


class UndecodableError(Exception):
    """The file holds no image that can be decoded; the message is the reason, in one line."""


def decode_image(file: BinaryIO, at_least: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Decode the first frame to 8-bit RGB, upright by its EXIF orientation.

    Grey and palette images become RGB, CMYK and Lab are converted, 16-bit grey keeps its high byte, and what is
    transparent lies on white.

    Args:
        file: open, seekable, at its begin; it stays open.
        at_least: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (by leaving out DCT coefficients) as long
            as both its sides stay at least twice this long; None decodes it whole.

    Returns:
        The image, and its own upright (width, height) before any such reduction.

    Raises:
        UndecodableError: no image, a damaged or truncated one, or one of more than `MAX_PIXELS`.
        OSError: the file itself can't be read (a failing disk).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata: the pixels are what counts
        try:
            image = Image.open(file)
        except Exception as error:
            raise _undecodable(error, "not an image") from error
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise UndecodableError(
                f"declares {size[0]} x {size[1]} pixels, more than the {MAX_PIXELS >> 20} Mpx allowed"
            )
        try:
            if at_least is not None:
                image.draft("RGB", (2 * at_least, 2 * at_least))
            image.load()
            turned = image.getexif().get(0x0112) in {5, 6, 7, 8}  # orientations that swap the sides
            rgb = to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # codecs raise nearly any type on hostile files
            raise _undecodable(error, "damaged") from error
    return rgb, (size[1], size[0]) if turned else size


def decode_bands(
    file: BinaryIO, name: str, channels: int, at_least: int | None = None
) -> tuple[list[Image.Image], tuple[int, int]]:
    """Decode to a given number of channels.

    Args:
        file: as `decode_image`: .npy with an array [H, W] or [H, W, channels], or any image that Pillow reads.
        name: the image's; its suffix says whether it is .npy.
        channels: 3 gives RGB, 1 grey (of colours, their luma); another number is read from .npy, or from an image of as many bands.
        at_least: as `decode_image`.

    Returns:
        One RGB image, or an 8-bit image a channel; and (width, height) as `decode_image`.

    Raises:
        UndecodableError, OSError: as `decode_image`; also a file of another number of channels, or of values without a range.
    """
    if Path(name).suffix.lower() == ".npy":
        array = _read_npy(file, channels)
        size = (array.shape[1], array.shape[0])
        if channels == 3:
            return [Image.fromarray(np.ascontiguousarray(array))], size
        return [Image.fromarray(np.ascontiguousarray(array[..., channel])) for channel in range(channels)], size
    if channels in (1, 3):
        image, size = decode_image(file, at_least)
        return [image if channels == 3 else image.convert("L")], size
    try:
        image = Image.open(file)
        bands = len(image.getbands())
        if bands == channels and image.size[0] * image.size[1] <= MAX_PIXELS:
            image.load()
            return list(image.split()), image.size
    except Exception as error:
        raise _undecodable(error, "not an image") from error
    raise UndecodableError(
        f"has {bands} channels, not {channels}; n-channel images are read from .npy files, [H, W, {channels}]"
    )


def _read_npy(file: BinaryIO, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of an array of 8 or 16 bits, or of floats from 0 to 1."""
    declared, in_columns, dtype = _npy_header(file)
    shape = (*declared, 1) if len(declared) == 2 else declared
    if len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] > MAX_PIXELS:
        raise UndecodableError(f"an array of shape {declared}, not [H, W, channels]")
    if shape[2] != channels:
        raise UndecodableError(f"has {shape[2]} channels, not {channels}")
    if dtype in (np.uint8, np.uint16) or dtype.kind == "f":
        array = _npy_values(file, math.prod(shape), dtype).reshape(shape, order="F" if in_columns else "C")
        if dtype == np.uint8:
            return array
        if dtype == np.uint16:
            return (array >> 8).astype(np.uint8)
        if np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1:
            return (np.asarray(array, dtype=np.float32) * 255).round().astype(np.uint8)
    raise UndecodableError(f"an array of {dtype} that is neither 8 nor 16 bits unsigned, nor from 0 to 1")


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it lies column by column, and type of what follows in a .npy file; nothing in it is unpickled."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in read:
            raise ValueError(f"version {version[0]}.{version[1]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on headers that Python 2 wrote
            shape, in_columns, dtype = read[version](file)
        if dtype.hasobject:
            raise ValueError("Python objects")
    except OSError:
        raise
    except Exception as error:  # it is a Python literal: a hostile one raises nearly any type, MemoryError too
        raise UndecodableError(f"not a plain .npy array: {' '.join(str(error).split())[:160]}") from error
    return shape, in_columns, dtype


def _npy_values(file: BinaryIO, count: int, dtype: np.dtype) -> np.ndarray:
    """[count] values from here on, read only when they are all there: a few bytes can declare gigabytes."""
    begin = file.tell()
    held, wanted = file.seek(0, os.SEEK_END) - begin, count * dtype.itemsize
    if held < wanted:
        raise UndecodableError(f"not a plain .npy array: declares {wanted} bytes and holds {held}")
    file.seek(begin)
    return np.frombuffer(file.read(wanted), dtype, count)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without clipping 16-bit values or losing what transparency hides."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16 and I: integers of 16 bits and more; the high byte is the 8-bit value
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # no range is declared: [0, 1] where all values lie there, else 0 to 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255.0 if values.max() <= 1.0 else 1.0
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab_to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        converted = ImageCms.applyTransform(image, lab_to_rgb)
        assert converted is not None
        return converted
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        return on_white.convert("RGB")
    return image.convert("RGB")


def _undecodable(error: Exception, otherwise: str) -> Exception:
    """What to raise: the file's fault as `UndecodableError`, the machine's (disk, memory) as it came."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in BY_A_BAD_FILE):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return UndecodableError("declares far more pixels than its size can hold (a decompression bomb)")
    if isinstance(error, Image.UnidentifiedImageError):
        return UndecodableError("not an image, or its header is damaged")
    text = " ".join(str(error).split())
    return UndecodableError(f"{otherwise}: {text}" if text else otherwise)


ImageFile.LOAD_TRUNCATED_IMAGES = False  # a half-decoded image must not become a grey middle image with tokens
