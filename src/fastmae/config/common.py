"""The options that every command has."""

import difflib
from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.options import Options, options
from fastmae.config.ranges import SEED, Range
from fastmae.errors import InputError

DEFAULT_TEACHER = "timm/vit_base_patch16_224.dino"
OFFLINE_TEACHER = "efficientnet-lite0"
"""A teacher whose weights come with a package."""
Precision = Literal["auto", "32-true", "tf32", "bf16-mixed", "16-mixed"]
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
ALIKE = 0.8
"""difflib's ratio of two words of which one is taken for a misspelling of the other."""
PIXELS = Range(ge=1, le=16384)
"""A side in pixels."""
BLOCK = Range(ge=-1024, le=1023)
"""The number of a block: from 0, or from -1 backwards. Which ones exist depends on the network."""


@options
class Common(Options):
    """Flags that every command takes."""

    seed: Annotated[int, SEED] = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps, or another accelerator that torch has on this machine, such as xpu."""
    json: bool = False
    """Print one JSON object as the last line of standard output; everything else goes to standard error."""
    config: Path | None = None
    """YAML file of options. Flags override it."""
    print_config: bool = False
    """Print the resolved options as YAML and exit."""
    traceback: bool = False
    """If the command fails, show the Python traceback too. For developers."""

    def check_shared(self) -> None:
        """See `Options`. Which devices there are is known to torch alone; a misspelt one is noticed without it."""
        kind = self.device.partition(":")[0]
        meant = difflib.get_close_matches(kind, DEVICES, 1, ALIKE)
        if meant and kind not in DEVICES:
            raise InputError(f"--device {self.device}: unknown; did you mean {meant[0]!r}?")
