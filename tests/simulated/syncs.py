"""Host syncs: where a program waits for the device, and why."""

import collections
import traceback
from pathlib import Path

import torch

PACKAGE = "/src/fastmae/"
OWN = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)


class SyncLog:
    """What made the program wait for the device, by the line of the package that asked for it.

    Attributes:
        counts: 'file:line: reason' -> how often.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def note(self, reason: str) -> None:
        """Count a sync at the innermost line of the package, or of what called torch if there is none."""
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith((OWN, TORCH))]
        of_package = [frame for frame in frames if PACKAGE in frame.filename]
        frame = (of_package or frames)[-1]
        self.counts[f"{frame.filename.split(PACKAGE)[-1]}:{frame.lineno}: {reason}"] += 1


SYNCS = SyncLog()
"""All syncs of this process."""
