"""`fastmae export`: an encoder written for another library, read back by it, compared, described, and only then put in its place."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from fastmae import __version__
from fastmae.config.exporting import ExportConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.evaluate.transforms import CROP_SHARE
from fastmae.exporting.folder import EXPORT_FILE, check_place, put_whole, read_export
from fastmae.exporting.format import Exported, Format, outputs_of
from fastmae.exporting.model_card import write_card
from fastmae.exporting.onnx_format import ONNX
from fastmae.exporting.provenance import Provenance, provenance_of
from fastmae.exporting.timm_format import TIMM
from fastmae.exporting.transformers_format import TRANSFORMERS
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runs.folder import RUN_FILE
from fastmae.runs.load import load_run
from fastmae.student.encoder import Encoder

FORMATS = {"timm": TIMM, "transformers": TRANSFORMERS, "onnx": ONNX}
TOLERANCE = 1e-4
"""Largest difference of a feature that passes, as a share of the largest feature where that is over 1."""
CHECKED_BATCHES = (1, 3)
"""Images a batch, in the check: no batch size may be built in."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Write an encoder; the command's JSON.

    Raises:
        InputError: nothing that can be opened, or not in this format, or a place that is taken.
        FailedCheckError: the other library does not give the encoder's features.
    """
    how = FORMATS[config.format]
    identity = {"format": config.format, "source": str(Path(config.run))}
    check_place(config.out, identity)
    torch.manual_seed(config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    model = as_classifier(opened) if config.classifier else as_encoder(opened)
    how.check(model)
    made = (
        provenance_of(model)
        if config.pretrained
        else Provenance("other", "Its weights are random: nothing was trained.", {})
    )
    description = {"fastmae export": 1, **identity, **_describe(config, model, made)}
    with put_whole(config.out, description) as folder:
        how.write(model, folder, config)
        difference = largest_difference(model, folder, how)
        write_card(folder, model, config.format, how, made, difference)
    files = [*read_export(config.out)["files"], EXPORT_FILE]
    print(
        f"{config.out}: {', '.join(files)}; what {how.library} gives differs from the encoder's by {difference:.1e} at most"
    )
    print(f"\n{how.usage(model, str(config.out))}", end="")
    return {
        "files": [str(config.out / name) for name in files], "format": config.format, "max_difference": difference,
        "architecture": model.architecture, "image_size": model.image_size, "patch_size": model.patch_size, "dim": model.dim,
        "classes": len(model.classes),
    }  # fmt: skip


def as_encoder(opened: OpenedEncoder) -> Exported:
    """An encoder as it goes out."""
    opened.network.reset_classifier(0)
    fields = {**vars(opened), "arguments": {**opened.arguments, "num_classes": 0, "img_size": opened.image_size}}
    return Exported(**fields, crop="whole" if opened.resize == "whole" else "center")


def as_classifier(opened: OpenedEncoder) -> Exported:
    """The classifier that fine-tuning made around an encoder.

    Raises:
        InputError: what was opened is no fine-tuned run.
    """
    path = Path(opened.source)
    description, weights = (
        load_run(path) if path.exists() and (path.is_file() or (path / RUN_FILE).is_file()) else ({}, {})
    )
    arguments = description.get("encoder", {}).get("arguments", {})
    if description.get("task") != "finetune" or not arguments.get("num_classes"):
        raise InputError(
            f"--classifier: {opened.source} is no run of `fastmae finetune`; leave it out to export the encoder"
        )
    network: Encoder = timm.create_model(opened.architecture, **arguments)
    network.load_state_dict(weights)
    size = opened.image_size
    if network.patch_embed.img_size != (size, size):
        network.set_input_size(img_size=(size, size))
    fields = {**vars(opened), "network": network.eval(), "arguments": {**arguments, "img_size": size}}
    return Exported(
        **fields, classes=tuple(description["data"]["classes"]), crop="center", crop_share=CROP_SHARE
    )  # as it was measured


def largest_difference(model: Exported, folder: Path, how: Format) -> float:
    """Between what a network gives and what the other library gives of its files, over batches of noise of several sizes.

    Raises:
        FailedCheckError: it is larger than rounding explains.
    """
    noise = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, model.channels, model.image_size, model.image_size, generator=noise)
        with torch.inference_mode():
            ours = outputs_of(model.network, images)
        for name, theirs in how.read(folder, images).items():
            mine = ours[name]
            difference = (mine - theirs).abs().max().item() if mine.shape == theirs.shape else float("inf")
            if not difference <= TOLERANCE * max(1.0, mine.abs().max().item()):  # nor where it is not a number
                what = (
                    f"{how.library} gives another {name} than the encoder, by {difference:.1e}, on a batch of {batch}"
                )
                raise FailedCheckError(f"{model.source}: {what}; nothing was written; try another --format")
            largest = max(largest, difference)
    return largest


def _describe(config: ExportConfig, model: Exported, made: Provenance) -> dict[str, Any]:
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
        "crop": model.crop,
        "crop_share": model.crop_share,
        "classes": list(model.classes),
        **({"opset": config.opset} if config.format == "onnx" else {}),
        "made": asdict(made),
    }
