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
        innermost = frames[-1]
        asked = next((frame for frame in reversed(frames) if PACKAGE in frame.filename), innermost)
        place = f"{asked.filename.split(PACKAGE)[-1]}:{asked.lineno}"
        if innermost is not asked:
            place += f" (in {innermost.filename.split('/site-packages/')[-1]}:{innermost.lineno})"
        self.counts[f"{place}: {reason}"] += 1


SYNCS = SyncLog()
"""All syncs of this process."""
