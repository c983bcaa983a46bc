"""Options of `fastmae export`."""

from pathlib import Path
from typing import Annotated, Literal

from fastmae.config.common import PIXELS, Common
from fastmae.config.options import options
from fastmae.config.ranges import Range
from fastmae.errors import InputError


@options
class ExportConfig(Common):
    """Write an encoder with a model card, so that timm, transformers, ONNX and others load it without fastmae."""

    run: str
    """A run's folder or checkpoint (of pretrain, or fine-tuned), an exported model, timm/NAME, or file/PATH."""
    out: Path
    """Folder to write: new, empty, or an earlier export of the same RUN in the same format, which is replaced."""
    format: Literal["timm", "transformers", "onnx", "mmpretrain", "detectron2", "jittor"] = "timm"
    """timm: for `timm.create_model`, in the hub's layout; transformers: for `ViTModel.from_pretrained`; onnx: one graph
    for any runtime; mmpretrain: for the ViT of OpenMMLab's tools; detectron2: for the ViT of ViTDet; jittor: a file
    that holds the network, and its weights."""
    image_size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels; position embeddings are resampled. Default: the encoder's own."""
    classifier: bool = False
    """For a run of finetune: the whole classifier, with the names of its classes (timm, onnx and jittor). Default: its
    encoder."""
    opset: Annotated[int, Range(ge=18, le=23)] = 18
    """Version of the ONNX operators: those that torch writes and onnxruntime reads."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    pretrained: bool = True
    """--no-pretrained writes the same architecture with random weights."""
    to: str | None = None
    """URL to which the export is copied, as `fastmae upload OUT URL` does: hf://OWNER/NAME, s3://BUCKET/NAME."""

    def check(self) -> None:
        """See `Options`."""
        if self.classifier and self.format == "transformers":
            raise InputError("--classifier: transformers' classifiers read the class token; use --format timm or onnx")
