"""Checks of many image files before training starts, shared by `segment` and `detect`."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastmae.images import decode
from fastmae.images.reading import read_or_refuse
from fastmae.runtime.progress import Progress

CHUNK = 4096
"""Files handed to the threads at once, so that waiting tasks take little memory."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def upright_size(path: Path, way_out: str) -> tuple[tuple[int, int], bool]:
    """Size of an image as it is shown, from its header alone: as `decode.upright_size`.

    Raises:
        InputError: it can't be read; `way_out` ends the message.
        OSError: the file can't be opened.
    """
    return read_or_refuse(path, decode.upright_size, way_out)


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, progress: Progress
) -> Iterator[Result]:
    """Results in the order of the items. The first error ends it; items that are still waiting are then not begun."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), CHUNK):
            for result in pool.map(function, items[start : start + CHUNK]):
                yield result
                progress.advance(1)
