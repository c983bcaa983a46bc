"""The rows of `bench step`: each a whole training step on a batch that lies ready, built from the parts that `pretrain` is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from fastmae.bench.gemm import BlockProducts
from fastmae.bench.published_mae import PublishedMae
from fastmae.config import BenchStepConfig, PretrainConfig, implied_values
from fastmae.errors import InputError, first_line
from fastmae.images.views import normalise
from fastmae.pretraining.step import optimizer_for
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch
from fastmae.student.encoder import build_encoder, sincos_positions, visible_patches
from fastmae.student.loss import StudentLoss
from fastmae.student.student import build_student
from fastmae.student.targets import NormPix, OnlineTokens, StoredTokens, Target, patch_norm
from fastmae.teachers import Teacher
from fastmae.tokens.codec import load_codec
from fastmae.tokens.loader import ViewBatch

CHANNELS = 3
CODEC = "fp16"
PUBLISHED, MAE = "MAE, as published", "MAE"


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        name: in the table.
        target: what is predicted: pixels by the authors' code or by ours, stored tokens, or an online teacher's.
        teacher: timm's name, of those that have one.
        channels: of what is predicted.
        paper: seconds and megabytes in Table 2, where it has the row.
    """

    name: str
    target: Literal["published", "pixels", "tokens", "teacher"]
    teacher: str
    channels: int
    paper: tuple[float, int] | None


PAPER = {
    ("pixels", 0): (0.14, 7857),
    ("tokens", 768): (0.09, 5371),
    ("teacher", 768): (0.16, 6225),
    ("tokens", 1024): (0.09, 5372),
    ("teacher", 1024): (0.25, 7805),
}
"""Table 2, ViT-B on a V100: (target, a teacher's channels) -> seconds a step and megabytes."""


def methods(config: BenchStepConfig) -> list[Method]:
    """MAE twice, and each teacher offline and online.

    Raises:
        InputError: a teacher that is no ViT of timm's.
    """
    pixels = CHANNELS * config.patch_size**2
    rows = [Method(PUBLISHED, "published", "", pixels, None), Method(MAE, "pixels", "", pixels, PAPER["pixels", 0])]
    for name in teacher_names(config.teachers):
        width = _width(name)
        rows.append(Method(f"FastMAE, {name} offline", "tokens", name, width, PAPER.get(("tokens", width))))
        rows.append(Method(f"FastMAE, {name} online", "teacher", name, width, PAPER.get(("teacher", width))))
    return rows


def teacher_names(given: str) -> list[str]:
    """`--teachers`.

    Raises:
        InputError: an unknown one, or one twice.
    """
    names = [name.strip() for name in given.split(",")]
    known = set(timm.list_models("vit_*"))
    for name in names:
        if name not in known:
            raise InputError(
                f"--teachers {given}: {name or 'an empty name'} is not one of timm's vit_* names (vit_base_patch16_224, ...)"
            )
    if len(set(names)) < len(names):
        raise InputError(f"--teachers {given}: names one twice")
    return names


@dataclass
class Step:
    """One row's training step.

    Attributes:
        model: the bare module that is trained.
        target: of the row; None for the authors' code, which makes its own.
        run: a step from the ready batch to the updated weights.
    """

    model: nn.Module
    target: Target | None
    run: Callable[[], None]

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@dataclass
class Steps:
    """Builds the rows' steps for one device; rows whose students are alike (offline and online) share it, to spare memory.

    Attributes:
        config: of the command.
        fabric: launched.
        students: by target channels and whether the target is pixels: what Fabric set up.
    """

    config: BenchStepConfig
    fabric: Fabric
    students: dict[tuple[int, bool], tuple[nn.Module, Any, Any, StudentLoss]] = field(default_factory=dict)

    @classmethod
    def launched(cls, config: BenchStepConfig) -> "Steps":
        """Device, precision and threads as asked for."""
        if config.threads:
            torch.set_num_threads(config.threads)
        return cls(config, launch(config.device, config.precision, 1, config.seed))

    @property
    def batch_size(self) -> int:
        """Views a step."""
        return self.config.batch_size or (256 if self.fabric.device.type == "cuda" else 32)

    @property
    def grid(self) -> int:
        """Patches along a view's side."""
        return self.config.image_size // self.config.patch_size

    def step(self, method: Method) -> Step:
        """A row's."""
        return self._published(method) if method.target == "published" else self._ours(method)

    def products(self) -> dict[str, BlockProducts]:
        """A block's of the encoder and of the decoder, in the precision of the steps.

        Raises:
            InputError: an encoder that can't be built.
        """
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision, torch.float32)
        encoder, options = self._encoder(), self._options("tokens")
        visible = visible_patches(self.grid**2, options.mask_ratio)
        sizes = {
            "encoder": (visible + encoder.num_prefix_tokens, encoder.embed_dim),
            "decoder": (self.grid**2, options.decoder_width),
        }
        return {name: BlockProducts(self.batch_size, *size, self.fabric.device, dtype) for name, size in sizes.items()}

    @property
    def precision(self) -> str:
        """As it was settled."""
        return str(self.fabric.strategy.precision.precision)

    def _ours(self, method: Method) -> Step:
        """As `pretrain` trains."""
        model, optimizer, student, loss = self._student(method.channels, pixels=method.target == "pixels")
        target, batch = self._target(method), self._batch(method)

        def scalar() -> torch.Tensor:
            images = normalise(batch.pixels)
            with self.fabric.autocast():  # a teacher computes in the student's precision
                wanted = target(batch, images)
            return loss(model(images, batch.ids_shuffle), wanted, batch.ids_shuffle)["loss"]

        return Step(student, target, self._trained(scalar, optimizer))

    def _published(self, method: Method) -> Step:
        """The authors' way: their code, torch's own AdamW with its defaults."""
        encoder, options = self._encoder(), self._options("pixels")
        visible = visible_patches(self.grid**2, options.mask_ratio)
        grid, width, heads = 2 * (self.grid,), int(encoder.embed_dim), int(encoder.blocks[0].attn.num_heads)
        positions = sincos_positions(grid, width), sincos_positions(grid, options.decoder_width)
        decoder = options.decoder_width, options.decoder_depth, options.decoder_heads
        mae = PublishedMae(self.config.patch_size, width, len(encoder.blocks), heads, visible, positions, decoder)
        model = self.fabric.setup_module(mae)
        groups = param_groups_weight_decay(mae, options.weight_decay)
        optimizer = self.fabric.setup_optimizers(torch.optim.AdamW(groups, lr=options.base_lr, betas=options.betas))
        batch = self._batch(method)
        return Step(mae, None, self._trained(lambda: model(normalise(batch.pixels), batch.ids_shuffle), optimizer))

    def _trained(self, scalar: Callable[[], torch.Tensor], optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            self.fabric.backward(scalar())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def _student(self, channels: int, pixels: bool) -> tuple[nn.Module, Any, Any, StudentLoss]:
        if (channels, pixels) not in self.students:
            options = self._options("pixels" if pixels else "tokens")
            student = build_student(options, self.config.patch_size, channels, CHANNELS)
            model = self.fabric.setup_module(student)
            optimizer = self.fabric.setup_optimizers(optimizer_for(options, student, self.fabric))
            loss = StudentLoss(options.loss, options.all_layers_weight, (channels,), (1.0,))
            self.students[channels, pixels] = model.train(), optimizer, student, loss
        return self.students[channels, pixels]

    def _target(self, method: Method) -> Target:
        if method.target == "pixels":
            return NormPix(self.config.patch_size)
        if method.target == "tokens":
            return StoredTokens([load_codec(CODEC, method.channels, {})], [patch_norm])
        grid = self._seen // self.config.patch_size
        try:
            network = timm.create_model(method.teacher, pretrained=False, num_classes=0)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"--teachers {method.teacher}: timm can't build it ({first_line(error)})") from error
        target = OnlineTokens(
            [Teacher(f"timm/{method.teacher}", network, self._seen, grid)], [patch_norm], self.grid, exact_flips=False
        )
        target.to(self.fabric.device)
        return target

    @property
    def _seen(self) -> int:
        """Side in pixels of what an online teacher looks at."""
        return self.config.image_size if self.config.online == "view" else self.config.middle_size

    def _batch(self, method: Method) -> ViewBatch:
        """A batch of noise, as the loader hands it to the device."""
        draws = torch.Generator().manual_seed(self.config.seed)
        size, patches = self.batch_size, self.grid**2

        def pixels(side: int) -> torch.Tensor:
            return torch.randint(0, 256, (size, CHANNELS, side, side), dtype=torch.uint8, generator=draws)

        stored = (
            [torch.randn(size, patches, method.channels, generator=draws).half()] if method.target == "tokens" else []
        )
        batch = ViewBatch(
            pixels(self.config.image_size),
            stored,
            [torch.empty(size, 0, dtype=torch.float16) for _ in stored],
            torch.stack([torch.randperm(patches, generator=draws) for _ in range(size)]),
            torch.zeros(size, 3, dtype=torch.int64),
            pixels(self._seen) if method.target == "teacher" else None,
        )
        return batch.to(self.fabric.device)

    def _options(self, target: str) -> PretrainConfig:
        asked = self.config
        options: dict[str, Any] = {
            "encoder": asked.encoder,
            "encoder_width": asked.encoder_width,
            "encoder_depth": asked.encoder_depth,
            "encoder_heads": asked.encoder_heads,
            "image_size": asked.image_size,
            "target": target,
        }
        return PretrainConfig(stores=(), run=Path(), **options, **implied_values(target))

    def _encoder(self) -> Any:
        asked = self.config
        with torch.device("meta"):
            return build_encoder(
                asked.encoder,
                asked.image_size,
                asked.patch_size,
                asked.encoder_width,
                asked.encoder_depth,
                asked.encoder_heads,
            )


def _width(teacher: str) -> int:
    with torch.device("meta"):
        network: Any = timm.create_model(teacher, pretrained=False, num_classes=0)
    return int(network.num_features)
