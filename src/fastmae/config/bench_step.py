"""Options of `fastmae bench step`."""

from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.bench_checks import check_out, check_sizes
from fastmae.config.common import PIXELS, Common, Precision
from fastmae.config.options import options
from fastmae.config.ranges import BATCH_OR_0, COMMAS, DEPTH, HEADS, PATCH, ROUNDS, THREADS, WIDTH
from fastmae.config.resolve import near
from fastmae.errors import InputError

ROWS = ("published", "mae", "offline", "online", "visible", "distil")
"""The kinds of rows."""


@options
class BenchStepConfig(Common):
    """Time a pre-training step of FastMAE against MAE's, with stored tokens and with online teachers (Table 2)."""

    rows: Annotated[str, COMMAS] = ",".join(ROWS)
    """What is measured, separated by commas. published, mae: MAE, by its authors' code and by ours. offline, online:
    FastMAE as in the paper, with stored tokens and with the teacher at every step. visible: the visible patches alone,
    without a decoder, with the losses of the recipe visible_tiny_cpu. distil: the same with nothing masked, which is
    plain distillation, offline and online. The last two take the first teacher. All rows train with AdamW."""
    encoder: str = "vit_base_patch16_224"
    """As in pretrain. (Table 2: ViT-B)"""
    encoder_width: Annotated[int | None, WIDTH] = None
    """As in pretrain."""
    encoder_depth: Annotated[int | None, DEPTH] = None
    """As in pretrain."""
    encoder_heads: Annotated[int | None, HEADS] = None
    """As in pretrain."""
    teachers: Annotated[str, COMMAS] = "vit_base_patch16_224,vit_large_patch16_224"
    """ViTs of timm, separated by commas, with random weights: only their size matters. (Table 2: ViT-B and ViT-L)"""
    online: Literal["view", "middle"] = "view"
    """Input of an online teacher: the view alone, which is the least work; or the whole middle image, which gives
    exactly the tokens that a store holds (`pretrain --target teacher`)."""
    image_size: Annotated[int, PIXELS] = 224
    """Side of a view in pixels. (Sec. 4.1.1)"""
    middle_size: Annotated[int, PIXELS] = 352
    """Side of the stored middle images in pixels, for the disk space of their tokens. (Sec. 3.2.3)"""
    patch_size: Annotated[int, PATCH] = 16
    """Side of a patch in pixels."""
    batch_size: Annotated[int, BATCH_OR_0] = 0
    """Views per step; 0: 256 on a GPU, 32 elsewhere."""
    precision: Precision = "auto"
    """As in pretrain."""
    count: bool = False
    """Time nothing. Count the kernels, the memory traffic and the floating-point operations of each row's step, as a
    GPU would run it; any machine can. Without --batch-size, the step has 1024 views."""
    compile: bool = False
    """Compile the steps of all rows with torch.compile, as `pretrain --compile` does."""
    rounds: Annotated[int, ROUNDS] = 5
    """Timed rounds; in each, every row makes one step in turn. Medians are reported."""
    warmup: Annotated[int, ROUNDS] = 2
    """Steps of each row before the timed rounds."""
    threads: Annotated[int, THREADS] = 0
    """Threads of torch on a CPU; 0: one per core. With 1, seconds are CPU time of this process, so that other work on
    the machine does not count."""
    out: Path | None = None
    """Markdown file for the table."""

    @property
    def row_kinds(self) -> tuple[str, ...]:
        """The rows that are asked for."""
        return tuple(word.strip() for word in self.rows.split(","))

    def check(self) -> None:
        """Refuse a row that does not exist."""
        self._check_sizes()
        for kind in self.row_kinds:
            if kind not in ROWS:
                raise InputError(
                    f"--rows {self.rows}: no row {kind!r}{near(kind, ROWS)}; give some of {','.join(ROWS)}"
                )

    def _check_sizes(self) -> None:
        check_sizes(self.patch_size, self.middle_size, self.image_size)
        check_out(self.out)
        if self.count and self.precision == "16-mixed":
            raise InputError(
                "--count: give --precision bf16-mixed or 32-true; what 16-mixed does depends on the gradients"
            )
        names = [name.strip() for name in self.teachers.split(",")]
        if len(set(names)) < len(names):
            raise InputError(f"--teachers {self.teachers}: a name is given twice")
