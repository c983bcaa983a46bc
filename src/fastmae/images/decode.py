"""Decode one open image file to upright 8-bit RGB, grey or n channels, or give the reason why that fails.

Pillow decodes the images; resizing is in middle.py. Arrays (.npy) are decoded here: NumPy's own functions parse the
header, and the values are read only if the file is as long as the header declares.
"""

import errno
import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from fastmae.images.codec_memory import bytes_per_pixel, codec_bytes
from fastmae.images.rgb import is_wide, pixels_of, to_rgb
from fastmae.images.value_range import AUTO, in_strips, to_8_bits
from fastmae.runtime.wording import counted

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "SGI", "PSD", "PCX", "XBM", "XPM"),
    "TGA",  # has no mark at its start, so it comes last
)
"""The formats that are read, by Pillow's names: those of the suffixes that count as images.

Pillow knows more. Some of them start a program (Ghostscript for EPS), call what a handler was registered for, or hold
another file of any format.
"""
MAX_PIXELS = 1 << 27
"""134 megapixels. A larger image is refused before decoding: a few bytes can declare gigabytes."""
MAX_BYTES = 800 << 20
"""Most memory that decoding an image may take, 840 MB. An image that would take more is refused before.

Pillow holds a colour image at 4 bytes a pixel. What comes on top depends on the format: `codec_bytes` tells.
"""
LARGE_PIXELS = 1 << 25
"""A decoded image of more pixels, 34 megapixels, is reduced by a whole factor where a much smaller one is wanted."""

BAD_FILE_ERRNOS = {None, errno.EINVAL, errno.EOVERFLOW}
"""`errno` of an OSError that a bad file causes.

A codec's own error has none. The system answers with the others when a damaged header makes the codec seek to an
impossible position.
"""

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns the image of an EXIF orientation upright."""
TRANSPOSED_ORIENTATIONS = {5, 6, 7, 8}
"""EXIF orientations whose upright image has width and height swapped."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` bounds the pixels
ImageFile.LOAD_TRUNCATED_IMAGES = False  # half a picture must not pass for a whole one, with tokens of grey areas


class UndecodableError(Exception):
    """The file holds no image that can be decoded. The message is the reason, in one line."""


def codec_memory(image: ImageFile.ImageFile) -> int:
    """`codec_bytes` of an image that `open_image` opened.

    Raises:
        UndecodableError: a damaged header.
        OSError: the file itself can't be read (a failing disk).
    """
    try:
        return codec_bytes(image)
    except Exception as error:  # hostile headers raise nearly any type
        raise _error_to_raise(error, "its header is damaged") from error


def load_image(image: ImageFile.ImageFile, codec: int, result: int = 0) -> None:
    """Decode the pixels of an image that `open_image` opened.

    Args:
        image: the image.
        codec: its `codec_memory`, before any draft.
        result: bytes that will be made of the pixels.

    Raises:
        UndecodableError: a damaged or truncated file, or one that takes more than `MAX_BYTES`.
        OSError: the file itself can't be read (a failing disk).
        MemoryError: there is not as much memory.
    """
    needed = math.prod(image.size) * bytes_per_pixel(image.mode) + max(codec, result)
    _check_memory(_pixels(image), needed)
    try:
        image.load()
    except Exception as error:  # codecs raise nearly any type on hostile files
        if not _is_free(needed):  # most codecs call that a broken file
            raise MemoryError from error
        raise _error_to_raise(error, "damaged") from error


def _check_memory(what: str, needed: int) -> None:
    """Refuse what takes more than `MAX_BYTES`; `what` begins the message: `... pixels take`."""
    if needed > MAX_BYTES:
        raise UndecodableError(
            f"{what} {needed / 1e9:.2f} GB to decode, more than the {MAX_BYTES / 1e9:.2f} GB allowed; make it smaller"
        )


def _pixels(image: ImageFile.ImageFile) -> str:
    return f"{image.width} x {image.height} pixels in {image.format} take"


def _is_free(size: int) -> bool:
    """Whether this process gets as many bytes of memory."""
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        return False
    return True


def upright_size(file: BinaryIO) -> tuple[tuple[int, int], bool]:
    """Size of an image as it is shown, from its header alone (or from a PNG's pixels, if metadata follow them).

    Args:
        file: as in `decode_image`.

    Returns:
        (width, height) in pixels, and whether the EXIF orientation swaps them.

    Raises:
        UndecodableError, OSError: as in `open_image`.
    """
    with open_image(file) as image:
        if image.format == "PNG" and _has_late_metadata(file):
            load_image(image, codec_memory(image))
        swapped = _orientation(image) in TRANSPOSED_ORIENTATIONS
        return (image.height, image.width) if swapped else image.size, swapped


def decode_image(
    file: BinaryIO, at_least: int | None = None, value_range: str = AUTO
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode the first frame to 8-bit RGB, turned upright by its EXIF orientation.

    Grey and palette images become RGB; CMYK and Lab are converted; 16-bit grey keeps its high byte unless a value range
    says otherwise; transparent pixels are blended onto white.

    Args:
        file: open and seekable, positioned at its start. It is left open.
        at_least: allows a large JPEG to be decoded at 1/2, 1/4 or 1/8 of its size (by dropping DCT coefficients) as
            long as both sides stay at least twice this many pixels; and any image of more than `LARGE_PIXELS` to be
            reduced by a whole factor within the same bound. None decodes at full size.
        value_range: how values of more than 8 bits become 8 bits (`value_range`).

    Returns:
        The image, and its full upright (width, height) before any such reduction.

    Raises:
        UndecodableError: not an image, a damaged or truncated one, or one of more than `MAX_PIXELS` or `MAX_BYTES`.
        OSError: the file itself can't be read (a failing disk).
        MemoryError: there is not as much memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata, which doesn't affect the pixels
        image = open_image(file)
        if value_range != AUTO:
            _check_values_are_whole(image)
        width, height = image.size
        factor, codec = 1, codec_memory(image)
        if at_least is not None:
            image.draft("RGB", (2 * at_least, 2 * at_least))
            if math.prod(image.size) > LARGE_PIXELS:
                factor = max(1, min(image.size) // (2 * at_least))
        result_bytes = 4 * math.prod(-(-side // factor) for side in image.size)
        is_result = image.mode == "RGB" and "transparency" not in image.info and factor == 1
        made_bytes = 0 if is_result else result_bytes
        if is_wide(image):  # the values as an array, then as 8 bits, of which the result is made
            made_bytes = math.prod(image.size) + max(math.prod(image.size) * bytes_per_pixel(image.mode), result_bytes)
        load_image(image, codec, made_bytes)
        orientation = _orientation(image)  # of a PNG, it may follow the pixels
        if orientation in UPRIGHT:
            _check_memory(_pixels(image), 2 * result_bytes)
        try:
            rgb = to_rgb(image, value_range, factor)
            del image  # its memory is free for the upright copy
            if orientation in UPRIGHT:
                rgb = rgb.transpose(UPRIGHT[orientation])
        except Exception as error:  # codecs raise nearly any type on hostile files
            raise _error_to_raise(error, "damaged") from error
    return rgb, (height, width) if orientation in TRANSPOSED_ORIENTATIONS else (width, height)


def _has_late_metadata(file: BinaryIO) -> bool:
    """Whether chunks that may tell the orientation follow the pixels of a PNG. Only their headers are read."""
    position, found, behind_pixels = file.tell(), False, False
    file.seek(8)
    while not found and len(header := file.read(8)) == 8 and header[4:] != b"IEND":
        behind_pixels |= header[4:] == b"IDAT"
        found = behind_pixels and header[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    file.seek(position)
    return found


def decode_bands(
    file: BinaryIO, name: str, channels: int, at_least: int | None = None, value_range: str = AUTO
) -> tuple[list[Image.Image], tuple[int, int]]:
    """Decode to a fixed number of channels.

    Args:
        file: as in `decode_image`; .npy with an array [H, W] or [H, W, channels], or any image that Pillow reads.
        name: name of the image; its suffix tells whether it is .npy.
        channels: 3 gives RGB, 1 grey (the luma of a colour image); any other number needs .npy, or an image with
            exactly that many bands.
        at_least: as in `decode_image`.
        value_range: as in `decode_image`; it maps arrays of 8 bits too.

    Returns:
        One RGB image, or one 8-bit image for each channel; and the full (width, height) as in `decode_image`.

    Raises:
        UndecodableError: as in `decode_image`; also a wrong number of channels, or values without a known range.
        OSError: as in `decode_image`.
    """
    if Path(name).suffix.lower() == ".npy":
        array = _npy_to_8_bits(_read_npy(file, channels), value_range)
        planes = [array] if channels == 3 else [array[..., channel] for channel in range(channels)]
        return [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes], (array.shape[1], array.shape[0])
    if channels in (1, 3):
        image, size = decode_image(file, at_least, value_range)
        return [image if channels == 3 else image.convert("L")], size
    return _decode_n_bands(file, channels, value_range)


def wide_values(file: BinaryIO, name: str, channels: int) -> np.ndarray | None:
    """The values of an image that a value range would map, [H, W] or [H, W, K]; None for a picture of 8 bits.

    Raises:
        UndecodableError, OSError: as in `decode_bands`.
    """
    if Path(name).suffix.lower() == ".npy":
        return _read_npy(file, channels)
    image = open_image(file)
    _check_values_are_whole(image)
    if not is_wide(image):
        return None
    load_image(image, codec_memory(image), math.prod(image.size) * bytes_per_pixel(image.mode))
    return pixels_of(image)


def _check_values_are_whole(image: ImageFile.ImageFile) -> None:
    """Refuse files of 16 bits in several channels, of which Pillow reads the high bytes only."""
    layout = str(image.tile[0].args) if image.tile else ""
    if ";16" in layout and not is_wide(image):
        raise UndecodableError("16 bits in several channels, which a value range can't map; save it as .npy")


def _decode_n_bands(file: BinaryIO, channels: int, value_range: str) -> tuple[list[Image.Image], tuple[int, int]]:
    image = open_image(file)
    if value_range != AUTO:
        _check_values_are_whole(image)
    bands = len(image.getbands())
    if bands != channels:
        raise UndecodableError(
            f"has {counted(bands, 'channel')}, not {channels}; n-channel images are read from .npy files, "
            f"[H, W, {channels}]"
        )
    load_image(image, codec_memory(image), math.prod(image.size) * bands)
    return list(image.split()), image.size


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Read an image's header. Every image from outside is opened here, and nothing of it is decoded yet.

    Args:
        file: open and seekable. It is left open, and must stay open until the image is loaded.

    Raises:
        UndecodableError: not an image in one of `FORMATS`, a damaged header, or more than `MAX_PIXELS`.
        OSError: the file itself can't be read (a failing disk).
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except Exception as error:
        raise _error_to_raise(error, "not an image") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UndecodableError(f"declares {width} x {height} pixels, more than the {MAX_PIXELS >> 20} Mpx allowed")
    return image


def _orientation(image: Image.Image) -> int | None:
    try:
        return Image.Image.getexif(image).get(EXIF_ORIENTATION)  # a PNG's own method would decode the pixels
    except Exception as error:
        raise _error_to_raise(error, "damaged") from error


def _read_npy(file: BinaryIO, channels: int) -> np.ndarray:
    """The values of an array, [H, W, channels], as they are in the file."""
    declared_shape, fortran_order, dtype = _read_npy_header(file)
    shape = (*declared_shape, 1) if len(declared_shape) == 2 else declared_shape
    if len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] > MAX_PIXELS:
        raise UndecodableError(f"an array of shape {declared_shape}, not [H, W, channels]")
    if shape[2] != channels:
        raise UndecodableError(f"has {counted(shape[2], 'channel')}, not {channels}")
    if dtype.kind not in "uif":
        raise UndecodableError(f"an array of {dtype} that is neither 8 nor 16 bits unsigned, nor other numbers")
    return _read_npy_values(file, math.prod(shape), dtype).reshape(shape, order="F" if fortran_order else "C")


def _npy_to_8_bits(array: np.ndarray, value_range: str) -> np.ndarray:
    """An array of numbers as uint8. `auto` takes unsigned 8 or 16 bits, and floats in [0, 1]."""
    if value_range != AUTO:
        return to_8_bits(array, value_range)
    if array.dtype == np.uint8:
        return array
    if array.dtype.newbyteorder("=") == np.uint16:
        return in_strips(array, lambda strip: strip >> 8)
    if array.dtype.kind == "f" and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1:
        return in_strips(array, lambda strip: (strip.astype(np.float32) * 255).round())
    raise UndecodableError(
        f"an array of {array.dtype} that is neither 8 nor 16 bits unsigned, nor from 0 to 1; tokenize --value-range "
        "maps any values"
    )


def _read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the values are in Fortran order, and dtype. Nothing is unpickled."""
    header_readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in header_readers:
            raise ValueError(f"version {version[0]}.{version[1]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns about headers that Python 2 wrote
            shape, fortran_order, dtype = header_readers[version](file)
        if dtype.hasobject:
            raise ValueError("Python objects")
    except OSError:
        raise
    except Exception as error:  # the header is a Python literal: a hostile one raises nearly any type, even MemoryError
        raise UndecodableError(f"not a plain .npy array: {' '.join(str(error).split())[:160]}") from error
    return shape, fortran_order, dtype


def _read_npy_values(file: BinaryIO, length: int, dtype: np.dtype) -> np.ndarray:
    """[length] values from the current position, read only if the file has them all: headers can declare gigabytes."""
    start = file.tell()
    bytes_present, bytes_declared = file.seek(0, os.SEEK_END) - start, length * dtype.itemsize
    if bytes_present < bytes_declared:
        raise UndecodableError(f"not a plain .npy array: declares {bytes_declared} bytes and holds {bytes_present}")
    _check_memory(f"an array of {length} values of {dtype} takes", bytes_declared + 3 * length)
    file.seek(start)
    return np.frombuffer(file.read(bytes_declared), dtype, length)


def _error_to_raise(error: Exception, default_reason: str) -> Exception:
    """`UndecodableError` if the file is at fault; the error itself if the machine is (disk, memory)."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in BAD_FILE_ERRNOS):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return UndecodableError("declares far more pixels than its size can hold (a decompression bomb)")
    if isinstance(error, Image.UnidentifiedImageError):
        return UndecodableError("not an image in a format that is read, or its header is damaged")
    text = " ".join(str(error).split())
    if "out of memory" in text.lower():
        return MemoryError(text)
    return UndecodableError(f"{default_reason}: {text}" if text else default_reason)
