"""Whether what a store holds makes sense: numbers that can be trained on, images that can be decoded, files that agree.

Checksums only say that a store's bytes are those that were written. A store whose checksums were made right again after
an edit passes them, so `audit` asks here too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastmae.errors import InputError, first_line
from fastmae.images import jpeg
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.tokens.codec import LARGEST_TOKEN, learnt_shapes, load_codec
from fastmae.tokens.format import CODEBOOKS_FILE, INDEX_FILE, STATISTICS_FILE, StoreInfo, list_name
from fastmae.tokens.index import IndexComparison
from fastmae.tokens.shard import DamagedError, MappedShard
from fastmae.tokens.shard_header import ImageRecord
from fastmae.tokens.statistics import added, are_close, no_sums, read_statistics, statistics_of
from fastmae.tokens.tensor_file import load_tensors

NO_NUMBERS = np.zeros(0, np.uint8)
BLOCK_BYTES = 1 << 20
"""Bytes of numbers that are looked at together."""


def bad_records(info: StoreInfo, shard: MappedShard) -> dict[int, str]:
    """The records of a shard that are not what was written, or can't be used. Reads every byte, decodes every JPEG.

    Returns:
        What is wrong with each of them, in one line, by their rows.
    """
    problems: dict[int, str] = {}
    for name in ("tokens", "token_means", "flipped_tokens", "flipped_token_means"):
        for row in _rows_beyond(shard.tensors.get(name, NO_NUMBERS)):
            problems[row] = f"the {name} of its image {row} hold NaN, infinity or numbers beyond {LARGEST_TOKEN:.0e}"
    for row in range(len(shard.record_checksums)):
        try:
            shard.codes(row)
            if shard.flipped_tokens is not None:
                shard.codes(row, flipped=True)
            if shard.pixels is not None:
                shard.raw_pixels(row)
            else:
                jpeg.check(shard.jpeg(row), info.middle_size, info.channels)
        except DamagedError as error:
            problems[row] = str(error).removeprefix(f"{shard.file}: ").split(";")[0]
        except (IndexError, ValueError) as error:
            problems[row] = f"the JPEG of its image {row} can't be decoded ({first_line(error)})"
    return problems


def _rows_beyond(numbers: np.ndarray) -> list[int]:
    """The rows of [n, ...] that hold NaN, infinity or magnitudes beyond `LARGEST_TOKEN`. Codes of int8 and pq can't.

    Without its sign bit, a float is larger than another just if its bits are, as a whole number; NaN comes last.
    """
    if numbers.dtype.kind != "f" or not numbers.size:
        return []
    bits = numbers.reshape(len(numbers), -1).view(f"u{numbers.itemsize}")
    limit = numbers.dtype.type(min(LARGEST_TOKEN, float(np.finfo(numbers.dtype).max))).view(bits.dtype)
    magnitude = bits.dtype.type((1 << (8 * numbers.itemsize - 1)) - 1)
    step = max(1, BLOCK_BYTES // (numbers.nbytes // len(numbers)))
    peaks = [(bits[start : start + step] & magnitude).max(1) for start in range(0, len(bits), step)]
    return np.flatnonzero(np.concatenate(peaks) > limit).tolist()


class Agreement:
    """Compares the files of a store with its shards, which are handed over in their order.

    Args:
        folder: the store.
        info: what it holds.
        sound: names of the small files that are as they were written; only these are compared.
    """

    def __init__(self, folder: Path, info: StoreInfo, sound: set[str]):
        self.info, self.folder = info, folder
        self.problems = self._small_file_problems(sound)
        sound = sound - self.problems.keys()
        self._index = IndexComparison(folder / INDEX_FILE, info) if INDEX_FILE in sound else None
        self._lists = {
            part: ImageList(folder / list_name(part)) for part in range(len(info.parts)) if list_name(part) in sound
        }
        self._sums, self._has_sums = no_sums(info), STATISTICS_FILE in sound
        self._decoded = 0

    def _small_file_problems(self, sound: set[str]) -> dict[str, str]:
        """What is wrong with a small file by itself, by the file's name."""
        shapes = learnt_shapes(self.info.codec, self.info.token_dim)
        problems: dict[str, str] = {}
        for name in sorted(sound):
            file = self.folder / name
            try:
                if name == STATISTICS_FILE:
                    read_statistics(file, self.info)
                elif name == CODEBOOKS_FILE:
                    load_codec(self.info.codec, self.info.token_dim, load_tensors(file, shapes))
            except InputError as error:
                problems[name] = str(error)
        return problems

    def skip(self, shard: int) -> None:
        """Pass over a damaged shard, of which nothing is known. The statistics can't be compared then."""
        self._has_sums = False
        if self._index is not None:
            self._index.compare(shard, None, len(self.info.part_of(shard)[1]))

    def add(self, shard: int, images: Sequence[ImageRecord], sums: Mapping[str, np.ndarray]) -> str | None:
        """Compare the next shard; returns what is wrong with the shard itself, in one line.

        Args:
            shard: number of the shard.
            images: from its header.
            sums: its tensors `SUMS`.
        """
        part, positions = self.info.part_of(shard)
        if self._index is not None:
            self._index.compare(shard, images, len(positions))
        self._sums = added(self._sums, sums)
        self._decoded += sum(image.row >= 0 for image in images)
        if part in self._lists:
            keys = [key_of(entry) for entry in self._lists[part].slice(positions.start, positions.stop)]
            if keys != [image.path for image in images]:
                return f"holds other images than {list_name(part)} names"
        if any((image.status == "ok") != (image.row >= 0) for image in images):
            return "its header says of an image both that it was decoded and that it was not"
        return None

    def end(self) -> dict[str, str]:
        """What is wrong with the small files, by their names, once all shards were added."""
        if self._index is not None and self._index.problem is not None:
            self.problems[INDEX_FILE] = self._index.problem
        if self._has_sums:
            stored = read_statistics(self.folder / STATISTICS_FILE, self.info)
            expected = statistics_of(self.info, self._sums, self._decoded) if self._decoded else None
            if expected is None or not are_close(stored, expected):
                self.problems[STATISTICS_FILE] = "is not the mean and the deviation of what the shards hold"
        return self.problems
