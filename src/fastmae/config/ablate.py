"""Options of `fastmae ablate`."""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from fastmae.config.common import BLOCK, Common
from fastmae.config.options import options
from fastmae.config.ranges import EPOCHS, PATCH, SECONDS, SEEDS, WORKERS, Range
from fastmae.config.teacher import OptionalTeacherName


@options
class AblateConfig(Common):
    """Run a study: arms of pre-training options side by side, on several data sets, with several teachers and seeds."""

    study: Path
    """A study file (.yaml), or the name of one that comes with the package. The paper's ablations: targets (Table 2:
    pixels, stored tokens, online teacher; and HOG), teachers (Table 3: stored and online; and the visible patches
    alone), tricks (Table 4: normalisation and all layers matter), encoders (Table 5: sizes and epochs), decoder (Sec.
    4.3.3: 1 to 4 blocks). Our own: beyond (the paper's recipe, the visible patches alone, plain distillation), losses
    (the visible patches alone, with one piece changed at a time), layers (one stage of the teacher, another one, and
    both)."""
    data: tuple[Path, ...] = field(metadata={"metavar": "DATA..."})
    """Labelled images, train/<class>/* and val/<class>/*: train/ is tokenised and pre-trained on without its labels.
    A data set's name is that of its folder."""
    out: Path | None = None
    """Folder for the runs, study.json and the page. The same call again continues. Default: fastmae-ablate/STUDY."""
    stores_in: Path | None = None
    """Folder for the token stores; several studies can share it. Default: OUT/stores."""
    held_out: bool = False
    """Measure on every fifth image of train/ instead of val/. For trying things out: val/ stays untouched."""
    jobs: Annotated[int, Range(ge=1, le=1024)] = 1
    """Runs that train at once, each in a process with its share of the CPU's threads. On a GPU, several small students
    keep it busy."""
    seeds: Annotated[int | None, SEEDS] = None
    """Runs of every arm, from --seed on. Default: the file's, or 1."""
    epochs: Annotated[float | None, EPOCHS] = None
    """Passes over the images, instead of the file's."""
    seconds: Annotated[float | None, SECONDS] = None
    """Every run trains for this time, instead of the file's epochs. They follow from the measured speed of its arm."""
    recipe: str | None = None
    """Recipe below the arms' options, instead of the file's."""
    base: str = ""
    """More pretrain options for every arm, over those of the file, as `flip=false,batch_size=64`."""
    teacher: OptionalTeacherName = None
    """As in tokenize, instead of the file's teachers. Several are separated by commas."""
    teacher_weights: Path | None = None
    """As in tokenize, for one teacher."""
    teacher_block: Annotated[int | None, BLOCK] = None
    """As in tokenize, for one teacher."""
    middle_size: str | None = None
    """As in tokenize, instead of the file's."""
    patch_size: Annotated[int | None, PATCH] = None
    """As in tokenize, instead of the file's."""
    workers: Annotated[int, WORKERS] = -1
    """Loading processes of a run; -1: its share of the cores but two, at least one."""

    inputs = ("data",)
