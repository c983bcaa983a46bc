"""What the stages work with: the device, the sizes, the folder, the time that is left, and the commands' processes."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.commands import Commands


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        images: photos in the stores.
        copies: how often each photo counts where tokenising is timed, so that the start of its processes hardly does.
        photo: width and height of a photo in pixels.
        middle: side of the middle images in pixels.
        view: side of a view in pixels.
        teacher: name of a ViT of timm.
        encoder: options of the student in the speed stages; {} for the recipe's own.
        small_batch: batch size of the small student whose losses are compared.
        small_steps: steps of the runs of it that are compared as a whole: enough to stop one before its end.
        batches: the small and the large batch of the speed stages.
        teacher_batch: images per forward pass of the bare teacher.
        timed_seconds: how long a rate is measured.
        workers: loading processes of small runs.
    """

    images: int
    copies: int
    photo: tuple[int, int]
    middle: int
    view: int
    teacher: str
    encoder: dict[str, Any]
    small_batch: int
    small_steps: int
    batches: tuple[int, int]
    teacher_batch: int
    timed_seconds: float
    workers: int


FULL = Sizes(4096, 6, (500, 375), 352, 224, "vit_base_patch16_224", {}, 64, 400, (256, 1024), 128, 5.0, 2)
TOY_ENCODER: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_depth": 2,
    "image_size": 32,
    "decoder_width": 32,
    "decoder_heads": 2,
}
TOY = Sizes(48, 2, (96, 72), 64, 32, "vit_tiny_patch16_224", TOY_ENCODER, 8, 60, (4, 8), 8, 0.05, 0)


@dataclass(frozen=True)
class Setting:
    """What the stages work with.

    Attributes:
        device: 'cuda', or 'cpu' at toy size.
        sizes: how large everything is.
        work: folder for data, stores and runs.
        ends: when the budget is spent, on the clock of `time.monotonic`.
        commands: runs fastmae's commands.
        detect: a pre-trained run and a data set in COCO's format; None: no detection on real boxes.
    """

    device: str
    sizes: Sizes
    work: Path
    ends: float
    commands: Commands
    detect: tuple[Path, Path] | None = None

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.ends - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether this is a GPU, at full size."""
        return self.device != "cpu"

    @property
    def photos(self) -> Path:
        """The unlabelled photos."""
        return self.work / "photos"

    @property
    def many(self) -> Path:
        """The same photos several times over, as links."""
        return self.work / "many"

    @property
    def labelled(self) -> Path:
        """A labelled set, train/<class>/* and val/<class>/*."""
        return self.work / "labelled"

    @property
    def teacher(self) -> list[str]:
        """Options that name the teacher and its weights."""
        return self.teacher_named(self.sizes.teacher)

    @property
    def small_teacher(self) -> list[str]:
        """The same for a small teacher."""
        return self.teacher_named("vit_tiny_patch16_224")

    @property
    def run(self) -> Path:
        """The run of a small student: compared with others, and then evaluated."""
        return self.work / "run"

    def small_run(self, run: Path) -> list[str]:
        """The arguments of `pretrain` for a run like `run`, in another folder."""
        return self.pretrain(run, steps=self.sizes.small_steps, precision="auto")

    def teacher_named(self, name: str) -> list[str]:
        """The same for a teacher by its name."""
        return ["--teacher", f"timm/{name}", "--teacher-weights", str(self.weights(name))]

    def weights(self, name: str) -> Path:
        """File with a teacher's random weights."""
        return self.work / f"{name}.safetensors"

    def store(self, codec: str) -> Path:
        """The store of the photos' tokens with this codec."""
        return self.work / f"{codec}.tokens"

    def pretrain(self, run: Path, *options: object, steps: int, precision: str, device: str = "") -> list[str]:
        """The arguments of `pretrain` for a small student, with every step logged."""
        batch, view = self.sizes.small_batch, self.sizes.view
        student = "--encoder vit_tiny_patch16_224 --encoder-depth 4 --decoder-width 128 --decoder-heads 4".split()
        size = ["--image-size", view, "--batch-size", batch, "--epochs", steps * batch / self.sizes.images]
        how = [
            "--device",
            device or self.device,
            "--precision",
            precision,
            "--log-every",
            1,
            "--workers",
            self.sizes.workers,
        ]
        return ["pretrain", str(self.store("pq38")), str(run), *student, *map(str, [*size, *how, *options])]
