"""The rows of `bench step`: a whole training step each, on a batch that is ready on the device.

FastMAE's rows and ours of MAE are assembled from the parts that `pretrain` uses: student, target, `PretrainStep`,
AdamW. A row's objective is what its student learns: MAE's pixels, the paper's (a decoder, and all layers), the visible
patches alone as in the recipe `visible_tiny_cpu`, or the same with nothing masked, which is plain distillation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from fastmae.bench.gemm import BlockProducts
from fastmae.bench.published_mae import PublishedMae
from fastmae.config import BenchStepConfig, PretrainConfig
from fastmae.config.recipes import load_recipe
from fastmae.errors import InputError
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, PixelScale
from fastmae.outside.networks import create_network
from fastmae.pretraining.plan import resolve_loss
from fastmae.pretraining.step import PretrainStep
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch
from fastmae.student.encoder import build_encoder, number_of_heads, sincos_positions, visible_patches
from fastmae.student.loss import StudentLoss
from fastmae.student.normalisation import patch_norm
from fastmae.student.student import Student, build_student
from fastmae.student.targets import NormPix, OnlineTokens, StoredTokens, Target
from fastmae.teachers import Teacher
from fastmae.tokens.codec import load_codec
from fastmae.tokens.loader import ViewBatch
from fastmae.training.optimiser import adamw
from fastmae.training.run import forward_step, set_up_model, take_step
from fastmae.training.state import TrainState

CHANNELS = 3
CODEC = "fp16"
GPU_BATCH_SIZE, CPU_BATCH_SIZE = 256, 32
PUBLISHED, MAE = "MAE, as published", "MAE"
BEYOND_PAPER = "visible_tiny_cpu"
OBJECTIVE = ("mask_ratio", "decoder_depth", "all_layers", "loss", "relation_weight", "relation_layers")
"""Options of a recipe that say what is learnt, whatever the sizes of the student."""

Objective = Literal["pixels", "paper", "visible", "distil"]
TargetKind = Literal["published", "pixels", "tokens", "teacher"]
PLACES: dict[str, TargetKind] = {"offline": "tokens", "online": "teacher"}
"""Where a teacher's features come from -> the target."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: name in the table.
        target: what is predicted: pixels by the authors' code, pixels by ours, stored tokens, or an online teacher's.
        objective: how.
        teacher: timm's name of the teacher; '' for pixels.
        channels: channels of the target.
        paper: the paper's seconds and megabytes in Table 2, or None.
    """

    name: str
    target: TargetKind
    objective: Objective
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
"""Table 2, ViT-B on a V100: (target, channels of a teacher's tokens) -> seconds per step and megabytes."""


def methods(config: BenchStepConfig) -> list[Method]:
    """The rows that `--rows` asks for.

    Raises:
        InputError: a teacher that is not a ViT of timm's.
    """
    pixels = CHANNELS * config.patch_size**2
    rows = [
        ("published", Method(PUBLISHED, "published", "pixels", "", pixels, None)),
        ("mae", Method(MAE, "pixels", "pixels", "", pixels, PAPER["pixels", 0])),
    ]
    widths = {name: _width(name) for name in teacher_names(config.teachers)}
    for name, width in widths.items():
        for place, target in PLACES.items():
            paper = PAPER.get((target, width))
            rows.append((place, Method(f"FastMAE, {name} {place}", target, "paper", name, width, paper)))
    first, width = next(iter(widths.items()))
    rows.append(("visible", Method(f"visible patches alone, {first} offline", "tokens", "visible", first, width, None)))
    for place, target in PLACES.items():
        rows.append(("distil", Method(f"distillation, {first} {place}", target, "distil", first, width, None)))
    return [row for kind, row in rows if kind in config.row_kinds]


def teacher_names(teachers: str) -> list[str]:
    """The names in `--teachers`.

    Raises:
        InputError: an unknown name, or one that is given twice.
    """
    names = [name.strip() for name in teachers.split(",")]
    known = set(timm.list_models("vit_*"))
    for name in names:
        if name not in known:
            raise InputError(
                f"--teachers {teachers}: {name or 'an empty name'} is not one of timm's vit_* names "
                "(vit_base_patch16_224, ...)"
            )
    return names


@dataclass
class Step:
    """The training step of a row.

    Attributes:
        model: the bare module that is trained.
        target: what is predicted; None for the authors' code, which makes its own targets.
        run: takes a step, from the ready batch to the updated weights.
        mask_ratio: fraction of the patches that is masked.
        loss_terms: the terms of its loss, in words.
    """

    model: nn.Module
    target: Target | None
    run: Callable[[], object]
    mask_ratio: float
    loss_terms: str

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@dataclass
class ReadyStudent:
    """A student on its device.

    Attributes:
        network: the bare module.
        optimizer: set up by Fabric.
        loss: its loss.
    """

    network: Student
    optimizer: Any
    loss: StudentLoss


@dataclass
class Steps:
    """Builds the rows' steps for one device. Rows with equal students (offline and online) share one, to save memory.

    Attributes:
        config: the bench's options.
        fabric: launched.
        students: (target channels, objective) -> student.
    """

    config: BenchStepConfig
    fabric: Fabric
    students: dict[tuple[int, Objective], ReadyStudent] = field(default_factory=dict)

    @classmethod
    def launched(cls, config: BenchStepConfig) -> "Steps":
        """With the device, precision and threads that the options ask for."""
        if config.threads:
            torch.set_num_threads(config.threads)
        return cls(config, launch(config.device, config.precision, 1, config.seed))

    @property
    def batch_size(self) -> int:
        """Views per step."""
        return self.config.batch_size or (GPU_BATCH_SIZE if self.fabric.device.type == "cuda" else CPU_BATCH_SIZE)

    @property
    def grid(self) -> int:
        """Patches along a side of a view."""
        return self.config.image_size // self.config.patch_size

    @property
    def precision(self) -> str:
        """The precision that `auto` became."""
        return (
            self.config.precision if self.config.precision == "tf32" else str(self.fabric.strategy.precision.precision)
        )

    def step(self, method: Method) -> Step:
        """The step of a row."""
        return self._published_step(method) if method.target == "published" else self._our_step(method)

    def products(self) -> dict[str, BlockProducts]:
        """The matrix products of a block of the encoder and of the decoder, in the precision of the steps; and, for
        distillation, of an encoder block that sees the whole view.

        Raises:
            InputError: an encoder that can't be built.
        """
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision, torch.float32)
        encoder, options = self._encoder(), self._options("paper")
        visible = visible_patches(self.grid**2, options.mask_ratio)
        tokens_and_width = {
            "encoder": (visible + encoder.num_prefix_tokens, encoder.embed_dim),
            "decoder": (self.grid**2, options.decoder_width),
        }
        if "distil" in self.config.row_kinds:
            unmasked = self.grid**2 + encoder.num_prefix_tokens
            tokens_and_width["encoder, nothing masked"] = (unmasked, encoder.embed_dim)
        return {
            name: BlockProducts(self.batch_size, tokens, width, self.fabric.device, dtype)
            for name, (tokens, width) in tokens_and_width.items()
        }

    def _our_step(self, method: Method) -> Step:
        """As `pretrain` trains."""
        student = self._student(method.channels, method.objective)
        step = PretrainStep(
            self._target(method), student.loss, IMAGENET_MEAN, IMAGENET_STD, autocast=self.fabric.autocast
        )  # the teacher gets the precision of the student, which is the faster one
        step.to(self.fabric)
        batch, options = self._batch(method), self._options(method.objective)
        state = TrainState(student.network, self._model(student.network, step), student.optimizer)
        run = partial(take_step, self.fabric, state, forward_step, [batch], 1, options.clip_grad)
        return Step(student.network, step.target, run, options.mask_ratio, _loss_terms(student.network))

    def _model(self, network: Student, step: PretrainStep) -> Any:
        return set_up_model(self.fabric, network, step, self.config.compile, step_in_forward=True).train()

    def _published_step(self, method: Method) -> Step:
        """As the authors train: their code, and torch's AdamW with its defaults."""
        encoder, options = self._encoder(), self._options("pixels")
        visible = visible_patches(self.grid**2, options.mask_ratio)
        grid, width, heads = 2 * (self.grid,), int(encoder.embed_dim), number_of_heads(encoder)
        positions = sincos_positions(grid, width), sincos_positions(grid, options.decoder_width)
        decoder = options.decoder_width, options.decoder_depth, options.decoder_heads
        mae = PublishedMae(self.config.patch_size, width, len(encoder.blocks), heads, visible, positions, decoder)
        model = self.fabric.setup_module(cast(nn.Module, torch.compile(mae)) if self.config.compile else mae)
        groups = param_groups_weight_decay(mae, options.weight_decay)
        optimizer: Any = self.fabric.setup_optimizers(
            torch.optim.AdamW(groups, lr=options.base_lr, betas=options.betas)
        )
        batch, pixel_scale = self._batch(method), PixelScale(IMAGENET_MEAN, IMAGENET_STD)

        def run() -> None:
            self.fabric.backward(model(pixel_scale(batch.pixels), batch.ids_shuffle))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Step(mae, None, run, options.mask_ratio, "decoder")

    def _student(self, channels: int, objective: Objective) -> ReadyStudent:
        if (channels, objective) not in self.students:
            options = self._options(objective)
            student = build_student(options, self.config.patch_size, channels, CHANNELS)
            assert isinstance(student, Student)  # a mask needs a plain ViT
            groups = param_groups_weight_decay(student.to(self.fabric.device), options.weight_decay)
            optimizer = adamw(groups, options.lr, options.betas, self.fabric)
            kind = resolve_loss(options, "vit")
            loss = StudentLoss((kind,), options.all_layers_weight, (channels,), (1.0,), options.relation_weight)
            self.students[channels, objective] = ReadyStudent(student, self.fabric.setup_optimizers(optimizer), loss)
        return self.students[channels, objective]

    def _target(self, method: Method) -> Target:
        if method.target == "pixels":
            return NormPix(self.config.patch_size)
        if method.target == "tokens":
            return StoredTokens([load_codec(CODEC, method.channels, {})], [patch_norm])
        network = create_network(method.teacher, {"num_classes": 0}, f"--teachers {method.teacher}")
        size = self._teacher_input_size
        teacher = Teacher(f"timm/{method.teacher}", network, size, size // self.config.patch_size)
        if self.config.precision == "tf32":  # 16-bit precisions reach the teacher through autocast
            teacher.precision = "tf32"
        return OnlineTokens([teacher], [patch_norm], self.grid, exact_flips=False)

    @property
    def _teacher_input_size(self) -> int:
        """Side of an online teacher's input in pixels."""
        return self.config.image_size if self.config.online == "view" else self.config.middle_size

    def _batch(self, method: Method) -> ViewBatch:
        """A batch of noise on the device, as the loader would hand it over."""
        generator = torch.Generator().manual_seed(self.config.seed)
        size, patches = self.batch_size, self.grid**2

        def pixels(side: int) -> torch.Tensor:
            return torch.randint(0, 256, (size, CHANNELS, side, side), dtype=torch.uint8, generator=generator)

        view_pixels = pixels(self.config.image_size)
        tokens = []
        if method.target == "tokens":
            tokens = [torch.randn(size, patches, method.channels, generator=generator).half()]
        batch = ViewBatch(
            pixels=view_pixels,
            tokens=tokens,
            means=[torch.empty(size, 0, dtype=torch.float16) for _ in tokens],
            ids_shuffle=torch.stack([torch.randperm(patches, generator=generator) for _ in range(size)]),
            crop=torch.zeros(size, 3, dtype=torch.int64),
            middle=pixels(self._teacher_input_size) if method.target == "teacher" else None,
        )
        return batch.to(self.fabric.device)

    def _options(self, objective: Objective) -> PretrainConfig:
        config = self.config
        given: dict[str, Any] = {"target": "pixels"} if objective == "pixels" else {}
        if objective in ("visible", "distil"):
            recipe = load_recipe(BEYOND_PAPER)
            given = {name: recipe[name] for name in OBJECTIVE if name in recipe}
        if objective == "distil":
            given["mask_ratio"] = 0.0
        return PretrainConfig(
            stores=(),
            run=Path(),
            encoder=config.encoder,
            encoder_width=config.encoder_width,
            encoder_depth=config.encoder_depth,
            encoder_heads=config.encoder_heads,
            image_size=config.image_size,
            **given,
        )

    def _encoder(self) -> Any:
        config = self.config
        with torch.device("meta"):
            return build_encoder(
                config.encoder,
                config.image_size,
                config.patch_size,
                config.encoder_width,
                config.encoder_depth,
                config.encoder_heads,
            )


def _loss_terms(student: Student) -> str:
    """The terms of a student's loss in words, as `decoder, 12 layers`."""
    layers = len(student.layer_heads)
    terms = {
        "decoder": student.has_decoder,
        "last layer": layers == 1,
        f"{layers} layers": layers > 1,
        "relations": bool(student.relation_layers),
    }
    return ", ".join(term for term, has in terms.items() if has)


def _width(teacher: str) -> int:
    with torch.device("meta"):
        network: Any = create_network(teacher, {"num_classes": 0})
    return int(network.num_features)
