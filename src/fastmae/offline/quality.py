"""What looks wrong in a store: pictures of one colour or few levels, near-duplicates, tokens that hardly differ.

All of it is found in what the store holds, so a store that was built in one go tells the same as one that was killed
ten times. The work is bounded: of a large store, a part of the images is looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.images.value_range import AUTO
from fastmae.runtime.progress import counted_through
from fastmae.runtime.wording import counted
from fastmae.tokens import TokenStore

FIRST, SPREAD = 512, 512
"""Images that are looked at: the first ones, which are compared with each other, and some all over the store."""
ONE_COLOUR = 3
"""Largest difference between the values of a channel in a picture of one colour."""
DARK, FEW_LEVELS = 40, 16
"""A picture uses few of its 256 levels if all its values are below the first, or differ by less than the second. Of 16
bits, 12 lie below 16, and 13 below 32; resizing and JPEG add a few. A photo of the sky has more."""
THUMBNAIL = 16
"""Side of the thumbnails that are compared, in pixels."""
SAME = 0.998
"""Correlation between the thumbnails of near-duplicates: the same photo at another size, quality or brightness. Shifted
by a tenth of its width, a photo stays far below."""
TOKEN_IMAGES, TOKEN_SIDE = 32, 8
"""Images whose tokens are compared, and patches along a side of the square in their middle that is taken."""
LEAST_SPREAD = 0.05
"""How much tokens differ at least, relative to their length. With real teachers, and also with random ones, it is 0.3
and more."""


@dataclass(frozen=True)
class Quality:
    """What was found. Images are numbered as in the store.

    Attributes:
        looked_at: number of images whose pixels were looked at.
        first: number of images that were compared with each other, from the beginning of the list.
        one_colour: images of one colour.
        few_levels: other images that use few of their 256 levels.
        duplicates: images that are nearly the same as an earlier one, and that one.
        token_spread: how much the tokens at one place differ from image to image: their standard deviation, relative to
            their length (both as root mean squares). 0 if all are zero; None for a store of one image.
    """

    looked_at: int
    first: int
    one_colour: list[int]
    few_levels: list[int]
    duplicates: list[tuple[int, int]]
    token_spread: float | None


def look_at(store: TokenStore) -> Quality:
    """Look at a store's images and tokens. Takes a few seconds of one core at most, however large the store is.

    Raises:
        InputError: a record that is read is damaged.
    """
    first = min(FIRST, len(store))
    numbers = sorted({*range(first), *_spread(len(store), SPREAD)})
    one_colour, few_levels, thumbnails = [], [], []
    for number in counted_through(numbers, "look at the store", "images", len(numbers)):
        pixels = store.pixels(number).contiguous()  # a JPEG is decoded with channels last, which is slow to search
        channels = pixels.flatten(1)
        darkest, brightest = channels.amin(1).int(), channels.amax(1).int()
        span = (brightest - darkest).max()
        if span <= ONE_COLOUR:
            one_colour.append(number)
        elif brightest.max() < DARK or span < FEW_LEVELS:
            few_levels.append(number)
        if number < first:
            thumbnails.append(F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL).flatten())
    duplicates = [pair for pair in _alike(torch.stack(thumbnails)) if pair[0] not in one_colour]
    return Quality(len(numbers), first, one_colour, few_levels, duplicates, _token_spread(store))


def _spread(total: int, count: int) -> list[int]:
    """At most `count` numbers from 0 to `total` - 1, evenly spaced."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int).tolist()


def _alike(thumbnails: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The rows that are nearly the same as an earlier one, and that one: float32 [n, d], n up to `FIRST`."""
    centred = F.normalize(thumbnails - thumbnails.mean(1, keepdim=True))
    likeness, earlier = (centred @ centred.T).tril(-1).max(1)
    for number in torch.nonzero(likeness >= SAME).flatten().tolist():
        yield number, int(earlier[number])


def _token_spread(store: TokenStore) -> float | None:
    numbers = _spread(len(store), TOKEN_IMAGES)
    if len(numbers) < 2:
        return None
    side = min(store.grid, TOKEN_SIDE)
    first = (store.grid - side) // 2
    tokens = torch.stack([store.view_tokens(number, first, first, side) for number in numbers])
    length = tokens.square().mean().sqrt()
    return float((tokens - tokens.mean(0)).square().mean().sqrt() / length) if length > 0 else 0.0


def as_json(quality: Quality, store: TokenStore) -> dict[str, Any]:
    """For the command's JSON: how many images of each kind, and one of them by name."""
    kinds = {
        "one_colour": quality.one_colour,
        "few_levels": quality.few_levels,
        "near_duplicates": [number for number, _ in quality.duplicates],
    }
    found = {
        name: {"images": len(numbers), "example": store.key(numbers[0]) if numbers else None}
        for name, numbers in kinds.items()
    }
    spread = None if quality.token_spread is None else round(quality.token_spread, 4)
    return {"looked_at": quality.looked_at, "compared": quality.first, **found, "token_spread": spread}


def as_lines(quality: Quality, store: TokenStore) -> list[str]:
    """For people: a line for each kind that was found, with a way out."""
    range_hint = "--value-range" if store.info.value_range == AUTO else "another --value-range"
    lines = []
    if quality.one_colour:
        lines.append(
            f"one colour: {len(quality.one_colour)} of {counted(quality.looked_at, 'image')} looked at "
            f"({store.key(quality.one_colour[0])}); 16-bit, integer or float values need {range_hint}, others are best "
            "removed"
        )
    if quality.few_levels:
        lines.append(
            f"few of their 256 levels: {len(quality.few_levels)} of {counted(quality.looked_at, 'image')} looked at "
            f"({store.key(quality.few_levels[0])}); 16-bit, integer or float values need {range_hint}"
        )
    if quality.duplicates:
        number, earlier = quality.duplicates[0]
        lines.append(
            f"nearly the same as an earlier image: {len(quality.duplicates)} of the first {quality.first} "
            f"({store.key(number)} as {store.key(earlier)}); each weighs as much as any other, so thin them out"
        )
    if quality.token_spread is not None and quality.token_spread < LEAST_SPREAD:
        teacher = store.info.teacher
        lines.append(
            f"the tokens of different images hardly differ (by {100 * quality.token_spread:.2g} % of their length); "
            f"give another teacher than {teacher.get('weights_file') or teacher['spec']}, or another --teacher-block"
        )
    return lines
