"""Middle images as JPEGs of which a part can be decoded alone: as long as a view is, not as long as the picture.

A restart marker after every block (MCU: 16 x 16 pixels at 4:2:0, the grid of the patches; 8 x 8 of grey) makes the blocks independent
of each other. So the JPEG of a view is the picture's header with other sides, and the blocks in question, byte for byte. Any JPEG
reader reads the whole. Chroma is upsampled by repeating it, so that no pixel depends on a neighbouring block and a part is, bit for
bit, what the whole has there.
"""

import io

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg

MARKER = 0xFF  # and behind it:
SOF, SOS, EOI = 0xC0, 0xDA, 0xD9
FIRST_RESTART, RESTARTS = 0xD0, 8
LONGEST_HEADER = 2048
"""Bytes; Pillow's own take about 600."""


def encode(pixels: torch.Tensor, quality: int) -> torch.Tensor:
    """uint8 [K, S, S] of one or three channels -> uint8 [bytes]."""
    rows = np.ascontiguousarray(pixels.permute(1, 2, 0))
    image = Image.fromarray(rows[..., 0] if len(pixels) == 1 else rows)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, restart_marker_blocks=1)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def decode(jpeg: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [bytes] -> uint8 [K, H, W]. The one decoder of stored pixels, for the teacher and the student alike."""
    rows = decode_jpeg(jpeg, colorspace="GRAY" if channels == 1 else "RGB", fastupsample=True)
    return rows.transpose(2, 0, 1)


def decode_part(jpeg: np.ndarray, top: int, left: int, side: int, size: int, channels: int) -> np.ndarray:
    """A square part of a picture: what `decode` has there, without decoding the rest.

    Args:
        jpeg: uint8 [bytes], from `encode`.
        top: of the part, in pixels.
        left: the same, across.
        side: of the part, in pixels.
        size: of the whole picture, S.
        channels: K.

    Returns:
        uint8 [K, side, side].
    """
    block = 8 if channels == 1 else 16
    row, col, end_row, end_col = top // block, left // block, -(-(top + side) // block), -(-(left + side) // block)
    sides, begin = _header(jpeg)
    cut = _cut(jpeg, begin, range(row, end_row), range(col, end_col), -(-size // block))
    height, width = min(size, end_row * block) - row * block, min(size, end_col * block) - col * block
    cut[sides : sides + 4] = (height >> 8, height & 255, width >> 8, width & 255)
    whole = decode(cut, channels)
    down, right = top - row * block, left - col * block
    return whole[:, down : down + side, right : right + side]


def _cut(jpeg: np.ndarray, begin: int, rows: range, cols: range, blocks: int) -> np.ndarray:
    """The header and the given blocks of a picture of `blocks` x `blocks`, restart markers numbered anew."""
    ends = _ends_of_blocks(jpeg, begin, rows.stop * blocks)
    chosen = np.arange(rows.start, rows.stop)[:, None] * blocks + np.arange(cols.start, cols.stop)
    starts = np.concatenate([[begin], ends])[chosen]
    ends = ends[chosen]
    cut = np.concatenate(
        [jpeg[:begin], *(jpeg[a:b] for a, b in zip(starts[:, 0].tolist(), ends[:, -1].tolist(), strict=True))]
    )
    markers = begin + np.cumsum(ends - starts) - 1  # the second byte of the marker that ends each block
    cut[markers] = FIRST_RESTART + np.arange(len(markers)) % RESTARTS
    cut[-1] = EOI
    return cut


def _ends_of_blocks(jpeg: np.ndarray, begin: int, count: int) -> np.ndarray:
    """Where each of the first `count` blocks ends, the marker behind it included.

    A byte 255 of the data is followed by a zero, so a marker can't be mistaken.
    """
    at = np.flatnonzero(jpeg[begin:-1] == MARKER) + (begin + 1)
    return at[jpeg[at] != 0][:count] + 1


def _header(jpeg: np.ndarray) -> tuple[int, int]:
    """Where the picture's height and width stand in the header, two bytes each, and where the header ends."""
    head, place, sides = jpeg[:LONGEST_HEADER].tobytes(), 2, 0
    while True:
        kind, after = head[place + 1], place + 2 + (head[place + 2] << 8) + head[place + 3]
        if kind == SOF:
            sides = place + 5
        if kind == SOS:
            return sides, after
        place = after
