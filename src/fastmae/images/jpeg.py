"""Middle images as JPEGs of which a part can be decoded alone, in time proportional to the part, not the whole.

A restart marker follows every block (an MCU: 16 x 16 pixels at 4:2:0, the patch grid; 8 x 8 in grey), so blocks don't
depend on each other. The JPEG of a view is then the whole's header with another height and width, followed by the
bytes of the blocks that the view needs. Chroma is upsampled by repetition, so no pixel depends on a neighbouring
block and a part is bit for bit what the whole shows there. Any JPEG reader can read the whole.
"""

import io

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg

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


def decode_part(jpeg: np.ndarray, top: int, left: int, side: int, size: int, channels: int) -> np.ndarray:
    """Decode a square part of an image: the pixels that `decode` has there, without decoding the rest.

    Copies the blocks that the part touches behind the header, writes their height and width into it, decodes that, and
    crops.

    Args:
        jpeg: uint8 [bytes], from `encode`.
        top: first row of the part, in pixels.
        left: first column of the part, in pixels.
        side: height and width of the part, in pixels.
        size: height and width of the whole image, S, in pixels.
        channels: number of channels, K.

    Returns:
        uint8 [K, side, side].
    """
    block = 8 if channels == 1 else 16
    first_row, first_col = top // block, left // block
    end_row, end_col = -(-(top + side) // block), -(-(left + side) // block)
    sides_at, header_end = _parse_header(jpeg)
    cut = _cut_blocks(jpeg, header_end, range(first_row, end_row), range(first_col, end_col), -(-size // block))
    height = min(size, end_row * block) - first_row * block
    width = min(size, end_col * block) - first_col * block
    cut[sides_at : sides_at + 4] = (height >> 8, height & 255, width >> 8, width & 255)
    top_in_cut, left_in_cut = top - first_row * block, left - first_col * block
    return decode(cut, channels)[:, top_in_cut : top_in_cut + side, left_in_cut : left_in_cut + side]


def _cut_blocks(jpeg: np.ndarray, header_end: int, rows: range, cols: range, blocks_per_row: int) -> np.ndarray:
    """The header and the blocks of these rows and columns, with their restart markers renumbered."""
    ends = _block_ends(jpeg, header_end, rows.stop * blocks_per_row)
    blocks = np.arange(rows.start, rows.stop)[:, None] * blocks_per_row + np.arange(cols.start, cols.stop)
    starts = np.concatenate([[header_end], ends])[blocks]
    ends = ends[blocks]
    # The blocks of a row lie side by side in the file: one copy for each row.
    row_spans = zip(starts[:, 0].tolist(), ends[:, -1].tolist(), strict=True)
    cut = np.concatenate([jpeg[:header_end], *(jpeg[start:end] for start, end in row_spans)])
    marker_bytes = header_end + np.cumsum(ends - starts) - 1  # the last byte of each block
    cut[marker_bytes] = FIRST_RESTART + np.arange(len(marker_bytes)) % RESTARTS
    cut[-1] = EOI
    return cut


def _block_ends(jpeg: np.ndarray, header_end: int, length: int) -> np.ndarray:
    """Ends of the first `length` blocks, each including the marker that follows the block.

    In compressed data a zero follows each byte 255, so anything else after a 255 is a marker.
    """
    after_ff = np.flatnonzero(jpeg[header_end:-1] == MARKER) + (header_end + 1)
    return after_ff[jpeg[after_ff] != 0][:length] + 1


def _parse_header(jpeg: np.ndarray) -> tuple[int, int]:
    """Offset of the image's height and width (two bytes each) in the header, and of the header's end."""
    header, segment, sides_at = jpeg[:LONGEST_HEADER].tobytes(), 2, 0
    while True:
        kind = header[segment + 1]
        next_segment = segment + 2 + (header[segment + 2] << 8) + header[segment + 3]
        if kind == SOF:
            sides_at = segment + 5
        if kind == SOS:
            return sides_at, next_segment
        segment = next_segment
