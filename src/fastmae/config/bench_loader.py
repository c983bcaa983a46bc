"""Options of `fastmae bench loader`."""

from pathlib import Path
from typing import Annotated

from fastmae.config.bench_checks import check_out, check_sizes
from fastmae.config.common import BLOCK, OFFLINE_TEACHER, PIXELS, Common
from fastmae.config.options import options
from fastmae.config.ranges import BATCH, COMMAS, COUNT, PATCH, ROUNDS, WORKERS
from fastmae.config.teacher import TeacherName
from fastmae.outside.codec_names import codec_names


@options
class BenchLoaderConfig(Common):
    """Measure on one core how fast a store delivers views with their tokens, against MAE's loading from image files."""

    images: Path
    """As in tokenize: photos, as large as those that will be trained on."""
    sample: Annotated[int, COUNT] = 256
    """Number of images, spread over IMAGES, that are loaded in every round."""
    rounds: Annotated[int, ROUNDS] = 7
    """Timed rounds; in each, every row has its turn. Medians are reported."""
    batch_size: Annotated[int, BATCH] = 64
    """Views per batch."""
    image_size: Annotated[int, PIXELS] = 224
    """Side of a view in pixels."""
    middle_size: Annotated[int, PIXELS] = 352
    """Side of the stored middle images in pixels."""
    patch_size: Annotated[int, PATCH] = 16
    """Side of a patch in pixels."""
    codecs: Annotated[str, COMMAS] = "fp16,pq48"
    """Codecs of the tokens, as in tokenize; several separated by commas."""
    teacher: TeacherName = OFFLINE_TEACHER
    """As in tokenize: only the width of its tokens matters here."""
    teacher_weights: Path | None = None
    """As in tokenize."""
    teacher_block: Annotated[int | None, BLOCK] = None
    """As in tokenize."""
    workers: Annotated[int, WORKERS] = -1
    """Decoding processes while the stores are built (which is not timed); -1: all cores but two, at least one."""
    out: Path | None = None
    """Markdown file for the table."""

    inputs = ("images",)

    def check(self) -> None:
        """See `Options`."""
        check_sizes(self.patch_size, self.middle_size, self.image_size)
        codec_names(self.codecs)
        check_out(self.out)
