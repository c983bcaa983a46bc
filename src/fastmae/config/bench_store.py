"""Options of `fastmae bench store`."""

from pathlib import Path
from typing import Annotated

from fastmae.config.bench_checks import check_out, check_sizes
from fastmae.config.common import BLOCK, OFFLINE_TEACHER, PIXELS, Common, Precision
from fastmae.config.options import options
from fastmae.config.ranges import BATCH, COMMAS, COUNT, COUNT_OR_0, JPEG_QUALITY, PATCH, ROUNDS, WORKERS
from fastmae.config.resolve import numbers
from fastmae.config.teacher import TeacherName
from fastmae.outside.codec_names import codec_names


@options
class BenchStoreConfig(Common):
    """Measure the disk space and the error of each codec, and how fast a store is built against the bare teacher."""

    images: Path
    """As in tokenize. If it has train/<class>/* and val/<class>/*, codecs learn on train/, errors are measured on val/,
    and k-NN accuracy is given."""
    codecs: Annotated[str, COMMAS] = "fp32,fp16,int8,pq32,pq48,pq64"
    """Codecs, as in tokenize; several separated by commas."""
    limit: Annotated[int, COUNT_OR_0] = 0
    """Number of images, spread over IMAGES, to measure on; 0: all."""
    middle_size: Annotated[int, PIXELS] = 352
    """Side of the middle images in pixels."""
    patch_size: Annotated[int, PATCH] = 16
    """Side of a patch in pixels."""
    teacher: TeacherName = OFFLINE_TEACHER
    """As in tokenize."""
    teacher_weights: Path | None = None
    """As in tokenize."""
    teacher_block: Annotated[int | None, BLOCK] = None
    """As in tokenize."""
    precision: Precision = "auto"
    """As in tokenize. The cosine of each precision's tokens to fp32's is measured in any case."""
    jpeg_qualities: Annotated[str, COMMAS] = "90"
    """JPEG quality of the stored pixels. Several, separated by commas, give the bytes of each; the teacher sees the
    first."""
    codec_images: Annotated[int, COUNT] = 512
    """Number of images from which int8 and pq<M> learn."""
    batch_size: Annotated[int, BATCH] = 32
    """Images per forward pass of the teacher."""
    workers: Annotated[int, WORKERS] = -1
    """Decoding processes; -1: all cores but two, at least one."""
    rounds: Annotated[int, ROUNDS] = 3
    """Timed rounds; in each, every row has its turn. Medians are reported."""
    out: Path | None = None
    """Markdown file for the table."""

    inputs = ("images",)

    def check(self) -> None:
        """See `Options`."""
        check_sizes(self.patch_size, self.middle_size)
        codec_names(self.codecs)
        check_out(self.out)
        self.qualities()

    def qualities(self) -> tuple[int, ...]:
        """`--jpeg-qualities` as numbers, each once.

        Raises:
            InputError: no whole numbers, or one out of its range.
        """
        return tuple(dict.fromkeys(numbers(Annotated[int, JPEG_QUALITY], self.jpeg_qualities, "--jpeg-qualities")))
