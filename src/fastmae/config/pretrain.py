"""Options of `fastmae pretrain`, and what a target implies for them."""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fastmae.config.common import PIXELS
from fastmae.config.options import options
from fastmae.config.ranges import (
    BATCH,
    COUNT_OR_0,
    DEPTH,
    EPOCHS,
    EPOCHS_OR_0,
    FRACTION,
    GIGABYTES,
    HEADS,
    LEARNING_RATE,
    WEIGHT_OR_0,
    WIDTH,
    Range,
)
from fastmae.config.recipes import load_recipe
from fastmae.config.resolve import Layer
from fastmae.config.teacher import OptionalTeacherName
from fastmae.config.training import TrainingConfig
from fastmae.errors import InputError


@options
class PretrainConfig(TrainingConfig):
    """Pre-train a ViT: mask 75 % of the patches of an aligned view, predict the stored features (Sec. 3.2.4)."""

    may_change: ClassVar[tuple[str, ...]] = (
        *TrainingConfig.may_change,
        *("stores", "run", "recipe", "strategy", "compile", "on_damage", "cache", "cache_size"),
        *("profile", "knn_every", "knn_data", "teacher"),
    )

    stores: tuple[str, ...] = field(metadata={"metavar": "STORE..."})
    """The token store: a folder or a URL (s3://, https://, any of fsspec's). Or several stores of the same images by
    different teachers: each gets a head and a loss of its own."""
    run: Path
    """Folder of the run. The same call again continues an interrupted one."""
    recipe: str | None = None
    """Named set of values: see `fastmae recipes`."""

    encoder: str = "vit_base_patch16_224"
    """Any vit_* name of timm; the store's patch size and --image-size replace its own (Sec. 4.1.1). With --mask-ratio
    0, any network of timm, as timm/resnet50."""
    encoder_width: Annotated[int | None, WIDTH] = None
    """Embedding width, instead of the encoder's own."""
    encoder_depth: Annotated[int | None, DEPTH] = None
    """Number of blocks, instead of the encoder's own."""
    encoder_heads: Annotated[int | None, HEADS] = None
    """Number of attention heads, instead of the encoder's own."""
    init: str = ""
    """Start from these weights instead of random ones: a run (with its decoder and heads, where they fit), timm/NAME, a
    checkpoint of MAE, DINO or iBOT, or an exported model."""
    image_size: Annotated[int, PIXELS] = 224
    """Side of a view in pixels. (Sec. 4.1.1)"""
    mask_ratio: Annotated[float, FRACTION] = 0.75
    """Fraction of the patches that the encoder does not see (Sec. 4.1.1). 0: plain distillation (implies
    --decoder-depth 0)."""
    mask: Literal["random", "block"] = "random"
    """Mask scattered patches, or rectangles as BEiT does."""
    target: Literal["tokens", "teacher", "pixels", "hog"] = "tokens"
    """What is predicted (g of Eq. 1). tokens: the stored tokens. teacher: the same features, but by running the store's
    teacher at every step (Table 2, online). pixels: MAE's normalised pixels (implies MAE's decoder and loss). hog:
    MaskFeat's HOG (implies its loss)."""
    teacher: OptionalTeacherName = None
    """With --target teacher: where the teacher of the store is, if it is code (python/MODULE:FUNCTION) or a file that
    has moved. Its weights must be those that the store records. Of several stores, it is for those whose teacher is
    code."""
    store_weights: str = ""
    """Weights of the losses of several stores, as `1,0.5`. Default: 1 each."""
    norm: Literal["auto", "patch", "channel", "store", "none"] = "auto"
    """Guidance normalisation (Sec. 4.2.2). auto: patch for a ViT teacher, store for a CNN, none for HOG. patch and
    channel standardise within a view, store over all images."""
    loss: Literal["auto", "smooth-l1", "mse", "cosine"] = "auto"
    """Loss between prediction and target. auto: cosine for a CNN teacher, else smooth-l1."""
    loss_on: Literal["masked", "all"] = "masked"
    """Patches that the decoder predicts."""
    all_layers: bool = True
    """All layers matter (Sec. 4.2.1): every encoder layer predicts the tokens of the visible patches. With
    --no-all-layers and --decoder-depth 0, the last layer alone does."""
    all_layers_weight: Annotated[float, WEIGHT_OR_0] = 1.0
    """Weight of the mean of the layers' losses."""
    relation_weight: Annotated[float, WEIGHT_OR_0] = 0.0
    """Weight of the relation loss, which is not in the paper: the cosines between a view's visible patches, in the
    encoder and in the teacher, should be equal. 0: none."""
    relation_layers: str = "last"
    """Encoder layers that the relation loss compares: last, all, or numbers from 0, as 2,3."""
    fusion: bool = False
    """The decoder reads the sum of all layers' projected outputs instead of the last layer alone."""
    decoder_depth: Annotated[int, Range(ge=0, le=256)] = 1
    """Transformer blocks of the decoder (Sec. 4.3.3). 0: no decoder; the visible patches alone are predicted."""
    decoder_width: Annotated[int, WIDTH] = 512
    """Width of the decoder."""
    decoder_heads: Annotated[int, HEADS] = 16
    """Attention heads of the decoder."""
    decoder_class_token: bool = False
    """The decoder also sees the encoder's class token, as in MAE."""
    flip: bool = True
    """Flip half of the views, pixels and token grid together."""

    epochs: Annotated[float, EPOCHS] = 60.0
    """Passes over the store (Sec. 4.1.1: 60 or 300). Fractions count: 0.5 visits half of the images."""
    warmup_epochs: Annotated[float, EPOCHS_OR_0] = 10.0
    """Epochs of linear warm-up, at most half of the run; then a cosine down to --min-lr."""
    batch_size: Annotated[int, BATCH] = 4096
    """Views per step, over all devices. (Sec. 4.1.1)"""
    base_lr: Annotated[float, LEARNING_RATE] = 1.5e-4
    """Learning rate for 256 views; the learning rate of a step is this times batch size / 256. (Sec. 4.1.1)"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: the paper's. muon: orthogonalised momentum for the weight matrices of the transformer blocks, AdamW for
    everything else; a student learns more from a step, which takes a little longer."""
    betas: Annotated[tuple[float, float], FRACTION] = (0.9, 0.95)
    """Betas of AdamW. (MAE's)"""

    compile: bool = False
    """Compile student, target and loss as one graph with torch.compile: minutes at the start, faster steps on a GPU."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each holds the whole student (ddp), or a part of its weights and optimizer state
    (fsdp)."""
    shuffle_window: Annotated[int | None, COUNT_OR_0] = None
    """Number of shards within which an epoch shuffles its images; 0: all. Default: all, if the store fits into memory
    (a remote store: into the cache), else as many shards as take a quarter of that."""
    cache: Path = Path("~/.cache/fastmae")
    """Folder for the files of remote stores."""
    cache_size: Annotated[float, GIGABYTES] = 50.0
    """Size limit of that folder in gigabytes, downloads under way included."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What to do at an image whose stored bytes are damaged."""
    profile: bool = False
    """Show where the time of a step goes, after 50 steps, and what to change. Nothing is trained or written."""
    knn_every: Annotated[float, EPOCHS_OR_0] = 0.0
    """Epochs between measurements of the encoder's k-NN accuracy; 0: none. They don't count as training time."""
    knn_data: Path | None = None
    """Labelled images for --knn-every, train/<class>/* and val/<class>/*. Default: the store's own images, labelled by
    their folders, every fifth one held out."""

    inputs = ("stores",)

    @property
    def lr(self) -> float:
        """Peak learning rate of a step."""
        return self.base_lr * self.batch_size / 256

    def with_epochs(self, epochs: float) -> "PretrainConfig":
        """The same options for a short run of so many epochs, at most a fifth of them warm-up."""
        return replace(self, epochs=epochs, warmup_epochs=min(self.warmup_epochs, epochs / 5))

    @classmethod
    def layers(cls, asked: Mapping[str, Any]) -> list[Layer]:
        """The values of the recipe, on top of what its target implies; and what another target implies, on top of it.

        A recipe's values fit its own target. Under another target, everything that either of the two targets implies is
        set anew. Likewise, a recipe's width, depth and heads are those of its own encoder.
        """
        name = asked.get("recipe")
        recipe = {} if name in (None, "None") else load_recipe(str(name))
        own = recipe.get("target", "tokens")
        target = asked.get("target") or own
        layers: list[Layer] = [(f"target {own}", TARGET_DEFAULTS[own]), (f"recipe {name}", recipe)]
        if isinstance(target, str) and target in TARGET_DEFAULTS and TARGET_DEFAULTS[target] != TARGET_DEFAULTS[own]:
            plain = {name: getattr(cls, name) for name in TARGET_DEFAULTS[own]}
            layers.append((f"target {target}", plain | TARGET_DEFAULTS[target]))
        encoder = asked.get("encoder")
        if encoder is not None and encoder != recipe.get("encoder", cls.encoder):
            layers.append((f"encoder {encoder}", dict.fromkeys(("encoder_width", "encoder_depth", "encoder_heads"))))
        if _is_zero(asked.get("mask_ratio")):
            layers.append(("mask ratio 0", {"decoder_depth": 0}))
        return layers

    def check(self) -> None:
        """Refuse options that contradict each other."""
        super().check()
        if self.teacher is not None and self.target != "teacher":
            raise InputError(f"--teacher {self.teacher}: goes with --target teacher; the stored tokens need no teacher")
        if self.store_weights and self.target in ("pixels", "hog"):
            raise InputError(f"--store-weights: --target {self.target} reads no stored tokens; leave it out")
        if self.strategy == "fsdp" and self.ema:
            raise InputError("--ema: no process holds a whole sharded student; use --strategy ddp")
        if self.strategy == "fsdp" and self.optimizer == "muon":
            raise InputError("--optimizer muon: needs whole weight matrices, not sharded ones; use --strategy ddp")
        if self.decoder_width % self.decoder_heads:
            raise InputError(
                f"--decoder-width {self.decoder_width}: not a multiple of --decoder-heads {self.decoder_heads}"
            )
        if self.mask_ratio == 0 and self.decoder_depth:
            raise InputError(
                f"--decoder-depth {self.decoder_depth}: with --mask-ratio 0 nothing is masked that a decoder could "
                "predict; use --decoder-depth 0"
            )
        if not self.decoder_depth:
            self._check_without_decoder()
        if self.target == "pixels" and (self.all_layers or self.norm not in ("none", "auto")):
            raise InputError("--target pixels is MAE's norm-pix loss: it needs --no-all-layers and --norm none")

    def _check_without_decoder(self) -> None:
        needs_decoder = {
            "--fusion": self.fusion,
            "--loss-on all": self.loss_on == "all",
            "--target pixels": self.target == "pixels",
            "--decoder-class-token": self.decoder_class_token,  # behind --target pixels, which sets it
        }
        asked = next((option for option, is_given in needs_decoder.items() if is_given), None)
        if asked is not None:
            raise InputError(f"{asked}: needs a decoder; give --decoder-depth 1 or more")


def _is_zero(number: Any) -> bool:
    """Whether a value from the command line, a file or Python is the number 0."""
    try:
        return float(number) == 0
    except (TypeError, ValueError):
        return False


TARGET_DEFAULTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "teacher": {},
    # MAE: mean squared error on norm-pix patches; eight decoder blocks that see the class token; one supervised layer.
    "pixels": {
        "loss": "mse",
        "norm": "none",
        "all_layers": False,
        "decoder_depth": 8,
        "decoder_class_token": True,
        "relation_weight": 0.0,
    },
    # MaskFeat: mean squared error on histograms that are already L2-normalised.
    "hog": {"loss": "mse", "norm": "none"},
}
"""What asking for a target sets, unless the option itself is given."""
