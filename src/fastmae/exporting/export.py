"""`fastmae export`: writes a model for another library, with a model card.

Before the export appears, it is read back, and its outputs are compared with the original model's.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastmae import __version__
from fastmae.config import ExportConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.exporting.detectron2_format import DETECTRON2
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import ExportedModel, classifier_to_export, encoder_to_export
from fastmae.exporting.jittor_format import JITTOR
from fastmae.exporting.mmpretrain_format import MMPRETRAIN
from fastmae.exporting.model_card import write_model_card
from fastmae.exporting.onnx_format import ONNX
from fastmae.exporting.output_folder import check_output_folder, complete_folder, read_export
from fastmae.exporting.provenance import RANDOM_WEIGHTS, Provenance, provenance_of
from fastmae.exporting.share import share_export
from fastmae.exporting.timm_format import TIMM
from fastmae.exporting.transformers_format import TRANSFORMERS
from fastmae.images.value_range import range_entry
from fastmae.offline.share import check_url
from fastmae.runs.encoder import open_encoder
from fastmae.runtime.cards import EXPORT_FILE
from fastmae.runtime.ownership import owned_place
from fastmae.runtime.progress import Progress
from fastmae.tokens.files import url_of

log = logging.getLogger(__name__)

FORMATS = {
    "timm": TIMM,
    "transformers": TRANSFORMERS,
    "onnx": ONNX,
    "mmpretrain": MMPRETRAIN,
    "detectron2": DETECTRON2,
    "jittor": JITTOR,
}
TOLERANCE = 1e-4
"""Largest difference between two outputs that passes; relative to the output's largest value where that is over 1."""
CHECKED_BATCHES = (1, 3)
"""Batch sizes of the check. There are two, so that a batch size built into a file is noticed."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a model; returns the command's JSON.

    Raises:
        InputError: the model can't be opened or does not fit the format, or the output folder holds something else, or
            another process exports to it.
        FailedCheckError: the files give other features.
    """
    if url := url_of(config.out):
        call = f"fastmae export {config.run} {Path(url).name} --to {url}"
        raise InputError(f"{url}: a URL; an export is written on this machine, then copied: `{call}`")
    if config.to is not None:
        check_url(config.to)
    with owned_place(config.out, "export"):
        result = _export(config)
    return result if config.to is None else {**result, "copied_to": share_export(config.out, config.to)}


def _export(config: ExportConfig) -> dict[str, Any]:
    export_format = FORMATS[config.format]
    identity = {"format": config.format, "source": str(Path(config.run))}
    check_output_folder(config.out, identity)
    torch.manual_seed(config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    model = classifier_to_export(opened) if config.classifier else encoder_to_export(opened)
    export_format.check(model)
    provenance = provenance_of(model) if config.pretrained else RANDOM_WEIGHTS
    description = {"fastmae export": 1, **identity, **_describe(config, model, provenance)}
    with complete_folder(config.out, description) as folder, Progress("export", minor=True) as progress:
        progress.now(f"writing for {export_format.library}")
        export_format.write(model, folder, config)
        progress.now("reading it back and comparing")
        difference = largest_difference(model, folder, export_format)
        write_model_card(folder, model, config.format, export_format, provenance, difference)
    files = [*read_export(config.out)["files"], EXPORT_FILE]
    log.info(
        f"{config.out}: {', '.join(files)}; read back by {export_format.reader}, the outputs differ by "
        f"{difference:.1e} at most\n\n{export_format.usage(model, str(config.out)).rstrip()}"
    )
    return {
        "files": [str(config.out / name) for name in files],
        "format": config.format,
        "max_difference": difference,
        "architecture": model.architecture,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "dim": model.dim,
        "classes": len(model.classes),
    }


def largest_difference(model: ExportedModel, folder: Path, export_format: ExportFormat) -> float:
    """The largest difference between the network's outputs and those computed from the files, on batches of noise.

    Raises:
        FailedCheckError: the difference is larger than rounding explains, or a shape differs.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, model.channels, model.image_size, model.image_size, generator=generator)
        with torch.inference_mode():
            expected_outputs = export_format.expected(model.network, images)
        for name, output in export_format.read(model, folder, images).items():
            expected = expected_outputs[name]
            same_shape = output.shape == expected.shape
            difference = (output - expected).abs().max().item() if same_shape else float("inf")
            allowed = TOLERANCE * max(1.0, expected.abs().max().item())
            if not difference <= allowed:  # written this way round, NaN fails too
                raise FailedCheckError(
                    f"{model.source}: {name} from {export_format.reader} differs by {difference:.1e} "
                    f"on a batch of {batch}; nothing was written; try another --format"
                )
            largest = max(largest, difference)
    return largest


def _describe(config: ExportConfig, model: ExportedModel, provenance: Provenance) -> dict[str, Any]:
    return {
        "fastmae": __version__,
        "architecture": model.architecture,
        "arguments": model.arguments,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "channels": model.channels,
        "mean": list(model.mean),
        "std": list(model.std),
        "resize": model.resize,
        **range_entry(model.value_range),
        "crop": model.crop,
        "crop_share": model.crop_share,
        "classes": list(model.classes),
        **({"opset": config.opset} if config.format == "onnx" else {}),
        "made": asdict(provenance),
    }
