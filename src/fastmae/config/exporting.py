"""Options of the commands that take a trained encoder elsewhere: its weights, or its features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.common import Common, Precision


@dataclass(kw_only=True)
class ExportConfig(Common):
    """Write an encoder with a model card, so that timm, transformers or ONNX load it without fastmae."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """A run's folder or checkpoint (of pretrain, or fine-tuned), an exported model, timm/NAME, or file/PATH."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write: new, empty, or of an earlier export of the same RUN in the same format, which is replaced."""
    format: Literal["timm", "transformers", "onnx"] = "timm"
    """timm: for `timm.create_model`, in the hub's layout; transformers: for `ViTModel.from_pretrained`; onnx: one graph for any runtime."""
    image_size: int | None = None
    """Side in pixels for which it is written, position embeddings resampled. Default: the encoder's own."""
    classifier: bool = False
    """Of a run of finetune: the whole classifier, with its classes' names (timm and onnx). Default: its encoder."""
    opset: int = 18
    """Version of the operators, for onnx."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    pretrained: bool = True
    """--no-pretrained writes the same architecture at random."""


@dataclass(kw_only=True)
class FeaturesConfig(Common):
    """Embed any set of images with an encoder: a vector an image, and with --dense one a patch."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """A run's folder or checkpoint (of pretrain, or fine-tuned), an exported model, timm/NAME, or file/PATH."""
    images: Positional[Annotated[Path, arg(metavar="IMAGES")]]
    """As in tokenize: a folder, a list of paths, tar shards, or a folder that Hugging Face datasets saved."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """File to write, .safetensors or .parquet; replaced when there already."""
    pool: Literal["mean", "class"] = "mean"
    """An image's vector: the mean of its patch tokens, or its class token."""
    dense: bool = False
    """Keep the patch tokens too, as a grid (.safetensors only)."""
    block: int | None = None
    """Which block's output, from 0, or negative from the end; default: the last. The final norm is applied in both cases."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Of what is written."""
    image_size: int | None = None
    """Side in pixels; default: the encoder's own."""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU that has it, 16-mixed on another, 32-true elsewhere."""
    batch_size: int = 64
    """Images a forward."""
    workers: int = -1
    """Decoding processes; -1: the cores but one, at most 8."""
    strict: bool = False
    """Stop at the first image that can't be decoded, instead of skipping it."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""
    pretrained: bool = True
    """--no-pretrained takes the same architecture at random."""
