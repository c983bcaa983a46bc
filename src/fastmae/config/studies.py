"""Options of the commands that compare: ablations, benches, the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.common import OFFLINE_TEACHER, Common


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
    mae_recipe: str = "mae_tiny_cpu"
    """Of the MAE row of the table targets: the same encoder, image size and batch, with a learning rate of its own."""
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
class DemoConfig(Common):
    """The whole path in minutes: tokenise, pre-train FastMAE and MAE for an equal time, compare by kNN, draw a page."""

    images: Path | None = None
    """Labelled images of your own, train/<class>/* and val/<class>/*; default: scikit-learn's handwritten digits."""
    out: Path = Path("fastmae-demo")
    """Folder for everything that it makes."""
    minutes: float = 2.0
    """Pre-training time for each of the two."""


@dataclass(kw_only=True)
class RecipesConfig(Common):
    """List the recipes."""


@dataclass(kw_only=True)
class BenchAccuracyConfig(Common):
    """Train FastMAE and MAE for an equal time on the same images, and draw their accuracy over that time: Fig. 5 at your size."""

    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """Labelled images, train/<class>/* and val/<class>/*: train/ is pre-trained on, without its labels; val/ is measured."""
    out: Path = Path("fastmae-accuracy")
    """Folder for the store, the runs, the figure and the table; the same call again goes on."""
    minutes: float = 30.0
    """Of training in all, dealt out equally to the methods and seeds. Tokenising and measuring come on top, and are told."""
    seeds: int = 1
    """Runs of each method, from --seed on; means are given, and their spread."""
    points: int = 10
    """Measurements along each run, evenly over its epochs, besides the one before it."""
    recipe: str = "vit_tiny_cpu"
    """Of FastMAE."""
    mae_recipe: str = "mae_tiny_cpu"
    """Of MAE: the same encoder, image size and batch."""
    teacher: str = OFFLINE_TEACHER
    """As in tokenize."""
    teacher_weights: Path | None = None
    """As in tokenize."""
    teacher_block: int | None = None
    """As in tokenize."""
    middle_size: str = "96"
    """As in tokenize."""
    patch_size: int = 8
    """As in tokenize."""
    flip: bool = True
    """As in pretrain."""
    workers: int = -1
    """Loading processes; -1: the cores but one, at most 8."""
