"""Options of `bench step`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmae.config.common import Common, Precision


@dataclass(kw_only=True)
class BenchStepConfig(Common):
    """Time a pre-training step of FastMAE beside MAE's, with stored tokens and with teachers at every step: Table 2 on this machine."""

    encoder: str = "vit_base_patch16_224"
    """As in pretrain. (Table 2: ViT-B)"""
    encoder_width: int | None = None
    """As in pretrain."""
    encoder_depth: int | None = None
    """As in pretrain."""
    encoder_heads: int | None = None
    """As in pretrain."""
    teachers: str = "vit_base_patch16_224,vit_large_patch16_224"
    """ViTs of timm, with commas between them, at random: their size is what counts. (Table 2: ViT-B and ViT-L)"""
    online: Literal["view", "middle"] = "view"
    """What an online teacher looks at: the view alone, the least that it can do; or the whole middle image, of which it then gives the
    very tokens that are stored (`pretrain --target teacher`)."""
    image_size: int = 224
    """Side of a view in pixels. (Sec. 4.1.1)"""
    middle_size: int = 352
    """Side of the stored middle images in pixels, for the disk that their tokens take. (Sec. 3.2.3)"""
    patch_size: int = 16
    """Side of a patch in pixels."""
    batch_size: int = 0
    """Views a step; 0: 256 on a GPU, 32 elsewhere."""
    precision: Precision = "auto"
    """As in pretrain."""
    rounds: int = 7
    """In each of which every row makes a step in its turn; medians are given."""
    warmup: int = 2
    """Steps of each row before that."""
    threads: int = 0
    """Of torch on a CPU; 0: one a core. With 1, seconds are this process's CPU time, so that other work on the machine does not count."""
    out: Path | None = None
    """Markdown file to write the table to."""
