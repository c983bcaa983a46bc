"""Options of `fastmae ablate`."""

from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.options import options
from fastmae.config.ranges import AT_LEAST_1
from fastmae.config.study import StudyConfig


@options
class AblateConfig(StudyConfig):
    """Run the rows of one of the paper's ablations at your size, on your images, next to the paper's figures."""

    table: Literal["targets", "teachers", "tricks", "encoders", "decoder"]
    """targets (Table 2: pixels, stored tokens, online teacher; and HOG), teachers (Table 3), tricks (Table 4:
    normalisation and all layers matter), encoders (Table 5: sizes and epochs), or decoder (Sec. 4.3.3: 1 to 4
    blocks)."""
    images: Path
    """Labelled images, train/<class>/* and val/<class>/*: train/ is tokenised and pre-trained on without its labels."""
    out: Path = Path("fastmae-ablate")
    """Folder for the stores, the runs and the page. The same call again continues with the missing rows."""
    epochs: Annotated[int, AT_LEAST_1] = 10
    """Epochs of every row (in the table encoders: of the longer rows)."""
