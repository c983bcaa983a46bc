"""Options of `pretrain`, and what a target implies for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fastmae.config.common import Common, Precision


@dataclass(kw_only=True)
class PretrainConfig(Common):
    """Pre-train a ViT: mask 75 % of the patches of an aligned view, predict the stored features (Sec. 3.2.4)."""

    stores: Positional[Annotated[tuple[str, ...], arg(metavar="STORE...")]]
    """The token store, a folder or a URL (s3://, https://, any of fsspec's); or several, of the same images by different teachers:
    each gets a head and a loss of its own."""
    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run; the same call again continues an interrupted one."""
    recipe: str | None = None
    """Named set of values: see `fastmae recipes`."""

    encoder: str = "vit_base_patch16_224"
    """Any vit_* name of timm; its patch and image size give way to the store's and --image-size. (Sec. 4.1.1)"""
    encoder_width: int | None = None
    """Another embedding width than the encoder's own."""
    encoder_depth: int | None = None
    """Another number of blocks than the encoder's own."""
    encoder_heads: int | None = None
    """Another number of attention heads than the encoder's own."""
    init: str = ""
    """Start from these weights instead of at random: a run (its decoder and heads too, where they fit), timm/NAME, a checkpoint of MAE's,
    DINO's or iBOT's own, an exported model."""
    image_size: int = 224
    """Side of a view in pixels. (Sec. 4.1.1)"""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see. (Sec. 4.1.1)"""
    mask: Literal["random", "block"] = "random"
    """Masked patches scattered, or in rectangles as BEiT has them."""
    target: Literal["tokens", "teacher", "pixels", "hog"] = "tokens"
    """What is predicted (g of Eq. 1): the stored tokens; the same by the stores' teachers, run at every step (Table 2's online);
    MAE's normalised pixels (which implies MAE's decoder and loss); MaskFeat's HOG (which implies its loss)."""
    store_weights: str = ""
    """Weights of the stores' losses, as `1,0.5`; default: 1 each."""
    norm: Literal["auto", "patch", "channel", "store", "none"] = "auto"
    """Guidance normalisation (Sec. 4.2.2). auto: patch for a ViT teacher's tokens, store for a CNN's, none for HOG."""
    loss: Literal["smooth-l1", "mse", "cosine"] = "smooth-l1"
    """Between prediction and target."""
    loss_on: Literal["masked", "all"] = "masked"
    """Which patches the decoder has to predict."""
    all_layers: bool = True
    """All layers matter (Sec. 4.2.1): every encoder layer predicts the tokens of the visible patches."""
    all_layers_weight: float = 1.0
    """Weight of the mean of those losses."""
    fusion: bool = False
    """The decoder reads the sum of every layer's projected output, instead of the last layer alone."""
    decoder_depth: int = 1
    """Transformer blocks of the decoder. (Sec. 4.3.3)"""
    decoder_width: int = 512
    """Its width."""
    decoder_heads: int = 16
    """Its attention heads."""
    decoder_class_token: bool = False
    """The decoder sees the encoder's class token too, as MAE's does."""
    flip: bool = True
    """Flip half of the views, pixels and token grid together."""

    epochs: int = 60
    """Passes over the store. (Sec. 4.1.1: 60 or 300)"""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up, at most half of the run; then a cosine to --min-lr."""
    batch_size: int = 4096
    """Views a step, over all devices. (Sec. 4.1.1)"""
    base_lr: float = 1.5e-4
    """Learning rate for 256 views; the step's is this times batch size / 256. (Sec. 4.1.1)"""
    min_lr: float = 0.0
    """Learning rate at the end."""
    weight_decay: float = 0.05
    """AdamW's, on weights with two and more dimensions. (Sec. 4.1.1)"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0: not clipped."""

    micro_batch: int = 0
    """Most views that a device takes at once; gradients of the rest of its share are accumulated. 0: all of it."""
    ema: float = 0.0
    """Decay of a moving average of the student, 0.9999 say; the encoder is then taken from it. 0: none."""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU that has it, 16-mixed on another, 32-true elsewhere."""
    compile: bool = False
    """Compile the student (torch.compile): minutes at the start, faster steps on a GPU."""
    checkpoint_activations: bool = False
    """Keep no activations of the blocks but compute them again: less memory, about a third more time."""
    devices: int = 1
    """Processes on this machine, a device each; or start them with torchrun or srun."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes: each with the whole student, or with a part of its weights and optimizer (CUDA only)."""
    workers: int = -1
    """Loading processes a device; -1: the cores but one, at most 8."""
    shuffle_window: int | None = None
    """Shards within which an epoch shuffles its images; 0: among all. Default: among all of a store that fits into the memory (of a
    URL: into the cache), else as many shards as take a quarter of that."""
    cache: Path = Path("~/.cache/fastmae")
    """Folder for what is read from URLs."""
    cache_size: float = 50.0
    """Gigabytes that it may take."""
    on_damage: Literal["stop", "skip"] = "stop"
    """At an image whose stored bytes are not those that were written: stop, or go on without it."""
    profile: bool = False
    """Say after 50 steps where a step's time goes and which part to change; nothing is trained or written."""
    knn_every: float = 0.0
    """Epochs between measurements of the encoder's k-NN accuracy; 0: none. They are not part of the training's seconds."""
    knn_data: Path | None = None
    """Labelled images for it, train/<class>/* and val/<class>/*. Default: the store's own, by their folders, every fifth held out."""
    save_every: float = 10.0
    """Minutes between checkpoints."""
    log_every: int = 10
    """Steps between log entries."""
    resume: bool = True
    """Continue from the run's checkpoint; --no-resume sets it aside and starts over."""


TARGET_DEFAULTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "teacher": {},
    # MAE: mean squared error on norm-pix patches, eight decoder blocks that see the class token, the last layer alone supervised.
    "pixels": {"loss": "mse", "norm": "none", "all_layers": False, "decoder_depth": 8, "decoder_class_token": True},
    # MaskFeat: mean squared error on histograms that are L2-normalised already.
    "hog": {"loss": "mse"},
}


def implied_values(target: str, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What asking for a target sets, above a recipe.

    A recipe's values fit its own target: under another one, what either of the two targets implies is set anew.

    Args:
        target: asked for.
        recipe: its values; none: nothing lies below.
    """
    implied = TARGET_DEFAULTS.get(target, {})
    own = TARGET_DEFAULTS[(recipe or {}).get("target", "tokens")]
    if recipe is not None and implied == own:
        return {}
    return {name: implied.get(name, getattr(PretrainConfig, name)) for name in own | implied}
