"""Options of `fastmae verify`."""

from typing import Annotated

from fastmae.config.common import Common
from fastmae.config.options import options
from fastmae.config.ranges import BATCH, WORKERS
from fastmae.config.teacher import OptionalTeacherName
from fastmae.errors import InputError


@options
class VerifyConfig(Common):
    """Check every byte of a token store and name what is damaged; with --repair, rebuild it from the images."""

    store: str
    """The token store: a folder, or a URL."""
    repair: bool = False
    """Rebuild only the damaged parts, from the images and the teacher that the store names."""
    teacher: OptionalTeacherName = None
    """With --repair: where the teacher of the store is, if it is code (python/MODULE:FUNCTION) or a file that has
    moved. Its weights must be those that the store records."""
    batch_size: Annotated[int, BATCH] = 32
    """Images per forward pass of the teacher during a repair. The same bytes need the same size as in tokenize."""
    workers: Annotated[int, WORKERS] = -1
    """Decoding processes; -1: all cores but two, at least one."""

    inputs = ("store",)

    def check(self) -> None:
        """See `Options`."""
        super().check()
        if self.teacher is not None and not self.repair:
            raise InputError(f"--teacher {self.teacher}: goes with --repair; a check alone needs no teacher")
