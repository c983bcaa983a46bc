"""What every command's options share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_TEACHER = "timm/vit_base_patch16_224.dino"
OFFLINE_TEACHER = "efficientnet-lite0"
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


@dataclass(kw_only=True)
class Common:
    """Flags that every command takes."""

    seed: int = 0
    """Seed of everything that is drawn."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    json: bool = False
    """Print one JSON object as the last line of standard output; all else goes to standard error."""
    config: Path | None = None
    """YAML file of options; flags go over it."""
    print_config: bool = False
    """Print the resolved options as YAML, and stop."""
