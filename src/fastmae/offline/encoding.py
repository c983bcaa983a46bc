"""Teacher and codec at work on batches of images: on the CPU, or on an accelerator that never waits for the CPU.

On a CPU the tokens of a whole shard are encoded at once, as ever: how sums are added up is part of a shard's bytes. On
an accelerator a batch's tokens are encoded and summed where they are, and only codes come back, while the device is at
the next batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastmae.offline.middle_images import DecodedBatch
from fastmae.runtime.copies import CopyLanes, Download
from fastmae.runtime.device import cores
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec
from fastmae.tokens.encoded import EncodedImages

MOST_WRITERS = 4
"""Most shards that are written at a time beside an accelerator. Each takes the memory of its codes and pixels."""


@dataclass(frozen=True)
class EncodedShard:
    """What a shard keeps of its images' tokens and pixels, on the CPU.

    Attributes:
        tokens: in one or more parts.
        flipped_tokens: those of the mirrored images, likewise; empty where the store does not keep them.
        pixel_sums: float64 [2, K], sum and sum of squares of each channel over pixel values in [0, 1].
    """

    tokens: Sequence[EncodedImages]
    flipped_tokens: Sequence[EncodedImages]
    pixel_sums: torch.Tensor


class Encoder(Protocol):
    """Makes encoded tokens of decoded images, batch by batch.

    Attributes:
        batches_ahead: batches that are started before the first one's output is asked for.
        writers: shards that may be written at a time.
        needs_pixel_sums: whether batches must come with their `pixel_sums`.
    """

    batches_ahead: int
    writers: int
    needs_pixel_sums: bool

    def start(self, batch: DecodedBatch) -> Any:
        """Begin with a batch."""
        ...

    def finish(self, started: Any) -> Any:
        """The output of a batch on the CPU, given what `start` returned."""
        ...

    def encoded(self, outputs: Sequence[Any]) -> EncodedShard:
        """Join the outputs of a shard's batches. Called on a thread of its own.

        Raises:
            InputError: tokens that the codec can't hold.
        """
        ...


def encoder_of(teacher: Teacher, codec: Codec, flips_stored: bool) -> Encoder:
    """The encoder for the teacher's device.

    Args:
        teacher: on its device.
        codec: the store's codec, with its codebooks.
        flips_stored: encode the tokens of the mirrored images too.
    """
    kind = CpuEncoder if teacher.mean.device.type == "cpu" else DeviceEncoder
    return kind(teacher, codec, flips_stored)


@dataclass(frozen=True)
class BatchTokens:
    """The tokens of a batch on the CPU, float32 [n, grid, grid, C], those of the mirrored images, and `pixel_sums`."""

    tokens: torch.Tensor
    flipped_tokens: torch.Tensor | None
    pixel_sums: torch.Tensor


class CpuEncoder:
    """Teacher and codec on the CPU. The arguments are those of `encoder_of`."""

    batches_ahead = 0
    writers = 1
    needs_pixel_sums = True

    def __init__(self, teacher: Teacher, codec: Codec, flips_stored: bool):
        self.teacher, self.codec, self.flips_stored = teacher, codec, flips_stored

    def start(self, batch: DecodedBatch) -> BatchTokens:
        """Run the teacher."""
        assert batch.pixel_sums is not None
        tokens = run_teacher(self.teacher, batch.pixels)
        flipped = run_teacher(self.teacher, batch.pixels.flip(-1)) if self.flips_stored else None
        return BatchTokens(tokens, flipped, batch.pixel_sums)

    def finish(self, started: BatchTokens) -> BatchTokens:
        """The same: the teacher is done."""
        return started

    def encoded(self, outputs: Sequence[BatchTokens]) -> EncodedShard:
        """Encode the tokens of a whole shard. See `Encoder`."""
        flipped = [output.flipped_tokens for output in outputs if output.flipped_tokens is not None]
        return EncodedShard(
            [self._encode([output.tokens for output in outputs])],
            [self._encode(flipped)] if flipped else [],
            torch.stack([output.pixel_sums for output in outputs]).sum(0),
        )

    def _encode(self, tokens: Sequence[torch.Tensor]) -> EncodedImages:
        encoded = EncodedImages.of(self.codec, torch.cat(list(tokens)))
        encoded.check(self.codec)
        return encoded


@dataclass(frozen=True)
class BatchCodes:
    """The encoded tokens of a batch on the CPU, those of the mirrored images, and `exact_pixel_sums`."""

    tokens: EncodedImages
    flipped_tokens: EncodedImages | None
    pixel_sums: torch.Tensor


class DeviceEncoder:
    """Teacher, codec and sums on an accelerator. The arguments are those of `encoder_of`."""

    batches_ahead = 2
    needs_pixel_sums = False

    def __init__(self, teacher: Teacher, codec: Codec, flips_stored: bool):
        self.teacher, self.codec, self.flips_stored = teacher, codec, flips_stored
        self.writers = writers_beside_a_device()
        self.lanes = CopyLanes(teacher.mean.device)

    def start(self, batch: DecodedBatch) -> Download:
        """Queue a batch on the device: images up, teacher, codec, sums, codes down."""
        pixels = self.lanes.upload(batch.pixels)
        views = [pixels, pixels.flip(-1)] if self.flips_stored else [pixels]
        encoded = [EncodedImages.of(self.codec, run_teacher(self.teacher, view)) for view in views]
        tensors = [tensor for part in encoded for tensor in (part.codes, part.means, part.sums, part.peak)]
        return self.lanes.download([exact_pixel_sums(pixels), *tensors])

    def finish(self, started: Download) -> BatchCodes:
        """Wait for a batch's codes.

        Raises:
            InputError: tokens that the codec can't hold.
        """
        sums, *tensors = started.wait()
        parts = [EncodedImages(*tensors[first : first + 4]) for first in range(0, len(tensors), 4)]
        for part in parts:
            part.check(self.codec)
        return BatchCodes(parts[0], parts[1] if self.flips_stored else None, sums)

    def encoded(self, outputs: Sequence[BatchCodes]) -> EncodedShard:
        """See `Encoder`."""
        return join_codes(outputs)


def join_codes(outputs: Sequence[BatchCodes]) -> EncodedShard:
    """The shard that the codes of its batches make up."""
    sums = torch.stack([output.pixel_sums for output in outputs]).sum(0).double()
    return EncodedShard(
        [output.tokens for output in outputs],
        [output.flipped_tokens for output in outputs if output.flipped_tokens is not None],
        sums / torch.tensor([[255.0], [255.0**2]], dtype=torch.float64),
    )


def writers_beside_a_device() -> int:
    """Shards that are written at a time while an accelerator computes."""
    return min(MOST_WRITERS, cores())


def run_teacher(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    """Tokens of middle images: uint8 [n, K, S, S] -> float32 [n, grid, grid, C], on the pixels' device; n may be 0."""
    if not len(pixels):
        return torch.zeros(0, teacher.grid, teacher.grid, teacher.token_dim, device=pixels.device)
    return teacher(pixels)


def exact_pixel_sums(pixels: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares of each channel of uint8 [n, K, S, S], int64 [2, K], on its device."""
    values = pixels.int()
    return torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
