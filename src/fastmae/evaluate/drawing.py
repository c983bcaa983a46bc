"""Drawing that several commands share: strangers' names as text, choosing images, the hues of classes, PNG bytes."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

mpl.use("agg")

GOLDEN_RATIO = 0.618034
"""Step between the hues of consecutive classes, as part of the colour circle. No two of any number are alike."""

LONGEST_LABEL = 40
"""Characters of a name in a picture."""


@contextlib.contextmanager
def text_as_it_is() -> Iterator[None]:
    """For a function that draws names: to Matplotlib, `$` would begin a formula. What the font lacks becomes a box."""
    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def label(name: str) -> str:
    """A name as it can be drawn: on one line, not too long.

    Halves of characters, which names of undecodable bytes hold, can't be drawn. A legend leaves out what begins with an
    underscore.
    """
    text = " ".join(name.encode(errors="replace").decode().split())
    text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
    return f" {text}" if text.startswith("_") else text


def class_hue(number: int, start: float = 0.0) -> float:
    """Hue of a class in [0, 1); `start` is the hue of class 0."""
    return (start + number * GOLDEN_RATIO) % 1


def evenly_spaced(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, the first and the last among them, evenly spaced."""
    positions = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[position] for position in positions]


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
