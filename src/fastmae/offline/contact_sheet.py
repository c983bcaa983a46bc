"""The suspicious images of a store as a picture: each as it is stored, with its name and what is wrong with it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastmae.offline.quality import Quality
from fastmae.tokens import TokenStore

MOST_OF_A_KIND = 24
"""Images of one kind that are drawn."""
PER_ROW, SIDE, GAP, CAPTION = 4, 128, 8, 36
"""Entries in a row; in pixels, the side of a picture, the free space around it, and the height of its caption."""


@dataclass(frozen=True)
class Entry:
    """One image.

    Attributes:
        picture: as the store has it, uint8 [K, S, S].
        beside: what to compare it with, likewise, or None.
        name: the image's key.
        reason: why it is here.
    """

    picture: torch.Tensor
    beside: torch.Tensor | None
    name: str
    reason: str


def entries(quality: Quality, store: TokenStore) -> list[Entry]:
    """What is drawn: the first images of each kind.

    Beside a picture of few levels is the same with its levels stretched; beside a near-duplicate, the earlier image.
    """
    flat = [
        Entry(store.pixels(number), None, store.key(number), "one colour")
        for number in quality.one_colour[:MOST_OF_A_KIND]
    ]
    dark = [
        Entry(pixels, _stretched(pixels), store.key(number), f"levels {pixels.min()} to {pixels.max()}; stretched")
        for number in quality.few_levels[:MOST_OF_A_KIND]
        for pixels in [store.pixels(number)]
    ]
    alike = [
        Entry(store.pixels(number), store.pixels(earlier), store.key(number), f"like {store.key(earlier)}")
        for number, earlier in quality.duplicates[:MOST_OF_A_KIND]
    ]
    return [*flat, *dark, *alike]


def contact_sheet_png(drawn: Sequence[Entry]) -> bytes:
    """The entries in rows, two pictures side by side for each, as a PNG file's bytes."""
    width, height = 2 * SIDE + 2 * GAP, SIDE + CAPTION + 2 * GAP
    rows = -(-len(drawn) // PER_ROW)
    sheet = Image.new("RGB", (min(PER_ROW, len(drawn)) * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 11)
    for number, entry in enumerate(drawn):
        left, top = GAP + number % PER_ROW * width, GAP + number // PER_ROW * height
        for column, pixels in enumerate((entry.picture, entry.beside)):
            if pixels is not None:
                sheet.paste(_picture(pixels), (left + column * SIDE, top))
        for line, text in enumerate((entry.name, entry.reason)):
            draw.text((left, top + SIDE + 3 + 16 * line), _shortened(text, font, 2 * SIDE), "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _stretched(pixels: torch.Tensor) -> torch.Tensor:
    """The same picture with its darkest value black and its brightest white."""
    low, high = pixels.min(), pixels.max()
    return ((pixels.float() - low) / (high - low) * 255).round().byte()


def _picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of `SIDE` pixels: grey, RGB, or the first three of more channels."""
    channels = [0, 0, 0] if len(pixels) < 3 else [0, 1, 2]
    return Image.fromarray(np.ascontiguousarray(pixels[channels].permute(1, 2, 0))).resize((SIDE, SIDE))


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Printable text that is no wider than this in pixels; of a longer one, the end, where names differ."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    shown = text[-200:]
    while font.getlength(shown if shown == text else f"...{shown}") > width:
        shown = shown[1:]
    return shown if shown == text else f"...{shown}"
