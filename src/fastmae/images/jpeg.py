"""Middle images as JPEGs of which a part can be decoded alone, in time proportional to the part, not the whole.

A restart marker follows every block (an MCU: 16 x 16 pixels at 4:2:0, the patch grid; 8 x 8 in grey), so blocks don't
depend on each other. The JPEG of a view is then the whole's header with another height and width, followed by the
bytes of the blocks that the view needs. Chroma is upsampled by repetition, so no pixel depends on a neighbouring
block and a part is bit for bit what the whole shows there. Any JPEG reader can read the whole.
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg

from fastmae.images.mirror import copy_reversed

# A marker is the byte MARKER and one of the others.
MARKER = 0xFF
SOF, SOS, EOI = 0xC0, 0xDA, 0xD9
FIRST_RESTART, RESTARTS = 0xD0, 8
LONGEST_HEADER = 2048
"""Bytes in which the header must end; Pillow's headers take about 600."""


def encode(pixels: torch.Tensor, quality: int) -> torch.Tensor:
    """uint8 [K, S, S] of one or three channels -> uint8 [bytes]."""
    pixels_hwc = np.ascontiguousarray(pixels.permute(1, 2, 0))
    image = Image.fromarray(pixels_hwc[..., 0] if len(pixels) == 1 else pixels_hwc)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, restart_marker_blocks=1)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def decode(jpeg: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [bytes] -> uint8 [K, H, W]. Teacher and student both get stored pixels from this one decoder."""
    pixels_hwc = decode_jpeg(jpeg, colorspace="GRAY" if channels == 1 else "RGB", fastupsample=True)
    return pixels_hwc.transpose(2, 0, 1)


def decode_middle(jpeg: np.ndarray, size: int, channels: int) -> np.ndarray:
    """`decode` of a middle image of `size` x `size` pixels, once its header says so: it could declare gigabytes.

    Raises:
        IndexError or ValueError: no such image.
    """
    _parse_header(jpeg, size, channels)
    return decode(jpeg, channels)


def check(jpeg: np.ndarray, size: int, channels: int) -> None:
    """Decode a whole middle image, and check that each part of it can be decoded alone.

    Raises:
        IndexError or ValueError: no image of `size` x `size` pixels that `encode` could have written.
    """
    header, _ = _parse_header(jpeg, size, channels)
    copy, edges = _block_edges(jpeg, len(header))
    blocks = -(-size // (8 if channels == 1 else 16))
    if edges[-1] != len(copy) - 2 or not np.array_equal(copy[edges[1:] + 1], _markers(blocks, blocks).ravel()):
        raise ValueError("its blocks are not marked one by one")
    decode(jpeg, channels)


def decode_part(jpeg: np.ndarray, top: int, left: int, size: int, out: np.ndarray, mirrored: bool = False) -> None:
    """Decode a square part of an image: the pixels that `decode` has there, without decoding the rest.

    Copies the blocks that the part touches behind the header, writes their height and width into it, decodes that, and
    crops.

    Args:
        jpeg: uint8 [bytes], from `encode`.
        top: first row of the part, in pixels.
        left: first column of the part, in pixels.
        size: height and width of the whole image, S, in pixels.
        out: where the part is written, uint8 [side, side, K]. A part of whole blocks is decoded straight into it where
            it is contiguous.
        mirrored: mirror the part from left to right.
    """
    side, _, channels = out.shape
    block = 8 if channels == 1 else 16
    first_row, first_col = top // block, left // block
    end_row, end_col = -(-(top + side) // block), -(-(left + side) // block)
    height = min(size, end_row * block) - first_row * block
    width = min(size, end_col * block) - first_col * block
    header, sides_at = _parse_header(jpeg, size, channels)
    header[sides_at : sides_at + 4] = (height >> 8, height & 255, width >> 8, width & 255)
    rows, cols = range(first_row, end_row), range(first_col, end_col)
    cut = b"".join([header, *_cut_blocks(jpeg, len(header), rows, cols, -(-size // block))])
    # Pixels are mirrored by reversing the bytes of each row, which also makes RGB of BGR.
    colours = "GRAY" if channels == 1 else "BGR" if mirrored else "RGB"
    straight = height == width == side and out.flags.c_contiguous
    pixels = decode_jpeg(cut, colorspace=colours, fastupsample=True, buffer=out if straight else None)
    top_in_cut, left_in_cut = top - first_row * block, left - first_col * block
    if mirrored:
        pixel_rows = pixels.reshape(height, width * channels)
        copy_reversed(pixel_rows.copy(), pixel_rows)
        left_in_cut = width - side - left_in_cut
    if not straight:
        out[...] = pixels[top_in_cut : top_in_cut + side, left_in_cut : left_in_cut + side]


def _cut_blocks(jpeg: np.ndarray, header_end: int, rows: range, cols: range, blocks_per_row: int) -> list[memoryview]:
    """The bytes of the blocks of these rows and columns, row by row, with their restart markers renumbered."""
    copy, edges = _block_edges(jpeg, header_end)
    length = rows.stop * blocks_per_row
    ends = edges[1 : length + 1].reshape(rows.stop, blocks_per_row)[rows.start :, cols.start : cols.stop]
    copy[1:][ends] = _markers(len(rows), len(cols))
    # The blocks of a row lie side by side.
    row_starts = edges[rows.start * blocks_per_row + cols.start : length : blocks_per_row]
    blocks = copy[2:].data
    return [blocks[start:end] for start, end in zip(row_starts.tolist(), ends[:, -1].tolist(), strict=True)]


def _block_edges(jpeg: np.ndarray, header_end: int) -> tuple[np.ndarray, np.ndarray]:
    """A copy of the blocks with two bytes in front, and where in it block i begins and the one before it ends."""
    copy = jpeg[header_end - 2 :].copy()  # the header's last two bytes stand for a marker in front of the first block
    # In compressed data a zero follows each byte 255, so anything else after a 255 is a marker.
    is_marker = copy[:-1] == MARKER
    is_marker &= copy[1:] != 0
    is_marker[0] = True
    return copy, is_marker.nonzero()[0]


@lru_cache(maxsize=16)
def _markers(rows: int, cols: int) -> np.ndarray:
    """The second bytes of the markers behind the blocks of an image, uint8 [rows, cols]."""
    markers = (FIRST_RESTART + np.arange(rows * cols) % RESTARTS).astype(np.uint8)
    markers[-1] = EOI
    return markers.reshape(rows, cols)


def _parse_header(jpeg: np.ndarray, size: int, channels: int) -> tuple[bytearray, int]:
    """The header, and the offset of the image's height and width (two bytes each) in it.

    Raises:
        IndexError or ValueError: not the header of such an image.
    """
    header, segment, sides_at = bytearray(jpeg[:LONGEST_HEADER]), 2, 0
    while True:
        kind = header[segment + 1]
        next_segment = segment + 2 + (header[segment + 2] << 8) + header[segment + 3]
        if kind == SOF:
            sides_at = segment + 5
            if header[segment + 4 : segment + 10] != _frame(size, channels):
                raise ValueError(f"it is no image of {size} x {size} pixels and {channels} channels")
            if channels == 3 and header[segment + 11 : next_segment : 3] != b"\x22\x11\x11":
                raise ValueError("its colours are not stored as 4:2:0")
        if kind == SOS:
            if not sides_at or len(header) < next_segment:
                raise ValueError("its header is incomplete")
            return header[:next_segment], sides_at
        segment = next_segment


@lru_cache(maxsize=16)
def _frame(size: int, channels: int) -> bytes:
    """What a header says about the image: bits of a value, height, width, and the number of channels."""
    return bytes((8, size >> 8, size & 255, size >> 8, size & 255, channels))
