"""What can be set, one typed dataclass a command; the fields' docstrings are the command line's help.

A value comes from, each over the one before: the default here, the recipe (recipes/*.yaml) on top of what its target implies
(`TARGET_DEFAULTS`), what another target implies that is asked for instead, `--config FILE`, the flag. Constants of the paper
stand here with their section, and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

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


@dataclass(kw_only=True)
class TokenizeConfig(Common):
    """Run a teacher once over every image and keep its patch features in a token store (Sec. 3.2)."""

    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """Folder of images, nested or flat; a list of paths (.txt, .csv, .parquet); webdataset tar shards (their folder); or a folder
    that Hugging Face datasets saved."""
    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """Folder to write; the same call again continues an interrupted one."""
    teacher: str = DEFAULT_TEACHER
    """timm/NAME (any timm model), hf/NAME (a vision model of transformers, by hub name or folder), clip/NAME (ViT-B-16, ...),
    file/PATH (a checkpoint of MAE, DINO or iBOT as its authors publish it), efficientnet-lite0 or efficientnet-lite2 (need no network)."""
    teacher_weights: Path | None = None
    """Weights file for a timm/NAME teacher, instead of the hub's: safetensors, or a PyTorch file without pickled code."""
    teacher_block: int | None = None
    """Which block's output to keep, counted from 0, or from -1 backwards; for a CNN, which stage. Default: the last."""
    teacher_last: int = 1
    """Average the outputs of this many of a ViT's blocks, up to the tapped one."""
    teacher_norm: Literal["auto", "final", "layer", "none"] = "auto"
    """Norm over the tapped features: the teacher's own final one, a LayerNorm without parameters, or none.
    auto: final for a ViT's last block, layer for its others, none for a CNN."""
    teacher_size: int | None = None
    """Side in pixels at which the teacher sees the middle image. Default: so that its grid is the store's."""
    middle_size: str = "352"
    """Side of the middle image in pixels (Sec. 3.2.3); several (256,352,448) keep each picture at each, and a view draws its scale."""
    patch_size: int = 16
    """Side of a patch in pixels (Sec. 4.1.1)."""
    channels: int = 3
    """Of the images, as the student will see them: 3 RGB, 1 grey, another number from .npy files [H, W, channels] or images of
    as many bands."""
    teacher_channels: str = ""
    """Which of them the teacher takes as red, green and blue. Default: 0,1,2 of RGB, 0,0,0 of grey."""
    resize: Literal["whole", "center-crop"] = "whole"
    """Squeeze the whole picture into the square, or cut its centre out of it."""
    codec: str = "fp16"
    """How a token lies on disk: fp32, fp16, int8, or pq<M>: M bytes each, product-quantised (pq48, say)."""
    codec_images: int = 512
    """Images on whose tokens int8 and pq<M> learn."""
    flips: Literal["approximate", "stored"] = "approximate"
    """A flipped view's tokens: the grid mirrored, or the teacher's own of the mirrored image (twice the time and the disk)."""
    pixels: Literal["jpeg", "raw"] = "jpeg"
    """How the middle images are kept."""
    jpeg_quality: int = 90
    """1 to 100."""
    shard_size: int = 256
    """Images a shard: what a kill loses at most, and what is held in memory."""
    batch_size: int = 32
    """Images a teacher forward."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""
    rank: int | None = None
    """Number of this process among several that fill one store, from 0. Default: torchrun's or srun's, or 0."""
    world_size: int | None = None
    """How many processes or machines fill the store together, with nothing between them but its folder. Default: torchrun's
    or srun's, or 1."""
    strict: bool = False
    """Stop at the first file that can't be decoded, instead of skipping it."""
    add: bool = False
    """Extend a finished store by the images of IMAGES that it does not hold yet."""
    dry_run: bool = False
    """Measure on a few images how big the store will be and how long it will take; write nothing."""


@dataclass(kw_only=True)
class InspectConfig(Common):
    """Say what a token store holds."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The token store."""


@dataclass(kw_only=True)
class VerifyConfig(Common):
    """Re-read every byte of a token store and check it; name what is damaged, and with --repair make it again from the images."""

    store: Positional[Annotated[Path, arg(metavar="STORE")]]
    """The token store."""
    repair: bool = False
    """Make just the damaged parts again, from the images and the teacher that the store names."""
    batch_size: int = 32
    """Images a teacher forward, in a repair; as in tokenize, for the same bytes."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""


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
    save_every: float = 10.0
    """Minutes between checkpoints."""
    log_every: int = 10
    """Steps between log entries."""
    resume: bool = True
    """Continue from the run's checkpoint; --no-resume sets it aside and starts over."""


@dataclass(kw_only=True)
class KnnConfig(Common):
    """k-nearest-neighbour accuracy of frozen features: train/ votes on val/."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """A run's folder or checkpoint, a bare timm name (timm/NAME), or a teacher (efficientnet-lite0)."""
    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """Folder with train/<class>/* and val/<class>/*."""
    features: Literal["encoder", "random", "teacher"] = "encoder"
    """Of a run: its trained encoder, the same encoder at random (the floor), or its store's teacher (the ceiling)."""
    pool: Literal["mean", "class"] = "mean"
    """Mean of the patch tokens, or the class token."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""
    image_size: int | None = None
    """Side in pixels; default: the encoder's own."""
    pretrained: bool = True
    """For timm/NAME: the hub's weights; --no-pretrained leaves it at random."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    block: int | None = None
    """Which block's output, for a teacher; default: the run's, or the last."""
    batch_size: int = 64
    """Images a forward."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""


@dataclass(kw_only=True)
class AblateConfig(Common):
    """Run the rows of one of the paper's ablations at your size, on your images, and put its figures beside the paper's."""

    table: Positional[Annotated[Literal["targets", "teachers", "tricks", "encoders", "decoder"], arg(metavar="TABLE")]]
    """targets (Table 2: pixels, stored tokens, online teacher; and HOG), teachers (Table 3), tricks (Table 4: normalisation and all
    layers matter), encoders (Table 5: sizes and epochs), or decoder (Sec. 4.3.3: 1 to 4 blocks)."""
    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """Labelled images, train/<class>/* and val/<class>/*: train/ is tokenised and pre-trained on, without its labels."""
    out: Path = Path("fastmae-ablate")
    """Folder for the stores, the runs, the page; the same call again goes on with the rows that are missing."""
    recipe: str = "vit_tiny_cpu"
    """Values that all rows share."""
    epochs: int = 10
    """Of every row (of the table encoders: of the longer rows)."""
    seeds: int = 1
    """Runs of every row, from --seed on; with more than one, means and deviations are given."""
    teacher: str = OFFLINE_TEACHER
    """As in tokenize; for the table teachers several, with commas between them."""
    teacher_weights: Path | None = None
    """As in tokenize, for one teacher."""
    teacher_block: int | None = None
    """As in tokenize, for one teacher."""
    middle_size: str = "96"
    """As in tokenize."""
    patch_size: int = 8
    """As in tokenize."""
    flip: bool = True
    """As in pretrain."""
    workers: int = -1
    """Loading processes; -1: the cores but one, at most 8."""


@dataclass(kw_only=True)
class BenchLoaderConfig(Common):
    """Measure on one core how fast views of a store come with their tokens, beside MAE's own loading from the files."""

    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """As in tokenize: photos, as large as they will be trained on."""
    sample: int = 256
    """Images from all over IMAGES that are loaded in every round."""
    rounds: int = 7
    """In each of which every row has its turn; medians are given."""
    batch_size: int = 64
    """Views a batch."""
    image_size: int = 224
    """Side of a view in pixels."""
    middle_size: int = 352
    """Side of the stored middle images in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    codecs: str = "fp16,pq48"
    """How the tokens lie on disk: several of tokenize's, with commas between them."""
    teacher: str = OFFLINE_TEACHER
    """As in tokenize: the channels of its tokens are what counts here."""
    teacher_weights: Path | None = None
    """As in tokenize."""
    teacher_block: int | None = None
    """As in tokenize."""
    workers: int = -1
    """Decoding processes while the stores are built (which is not measured); -1: the cores but one, at most 8."""
    out: Path | None = None
    """Markdown file to write the table to."""


@dataclass(kw_only=True)
class BenchStoreConfig(Common):
    """Measure what each way to keep tokens takes on disk and loses, and how fast a store is built beside the bare teacher."""

    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """As in tokenize. With train/<class>/* and val/<class>/* in it, codecs learn on train/, errors are val/'s, and kNN is given."""
    codecs: str = "fp32,fp16,int8,pq32,pq48,pq64"
    """Several of tokenize's, with commas between them."""
    limit: int = 0
    """Images from all over IMAGES to measure on; 0: all."""
    middle_size: int = 352
    """Side of the middle images in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    teacher: str = OFFLINE_TEACHER
    """As in tokenize."""
    teacher_weights: Path | None = None
    """As in tokenize."""
    teacher_block: int | None = None
    """As in tokenize."""
    jpeg_qualities: str = "90"
    """Of the stored pixels: several, with commas between them, give the bytes of each; the teacher sees the first."""
    codec_images: int = 512
    """Images on whose tokens int8 and pq<M> learn."""
    batch_size: int = 32
    """Images a teacher forward."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""
    rounds: int = 3
    """In each of which every timed work has its turn; medians are given."""
    out: Path | None = None
    """Markdown file to write the table to."""


@dataclass(kw_only=True)
class RecipesConfig(Common):
    """List the recipes."""


@dataclass(kw_only=True)
class DemoConfig(Common):
    """The whole path in minutes: tokenise, pre-train FastMAE and MAE for an equal time, compare by kNN, draw a page."""

    images: Path | None = None
    """Labelled images of your own, train/<class>/* and val/<class>/*; default: scikit-learn's handwritten digits."""
    out: Path = Path("fastmae-demo")
    """Folder for everything that it makes."""
    minutes: float = 2.0
    """Pre-training time for each of the two."""


TARGET_DEFAULTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "teacher": {},
    # MAE: mean squared error on norm-pix patches, eight decoder blocks, the last layer alone supervised.
    "pixels": {"loss": "mse", "norm": "none", "all_layers": False, "decoder_depth": 8},
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
